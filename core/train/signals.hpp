// SIGINT and SIGTERM as a wish to stop after the running step.
#pragma once

namespace tessera {

// Installs the handlers while alive. A second SIGINT or SIGTERM ends the process at once.
class StopSignals {
 public:
  StopSignals();
  ~StopSignals();
  StopSignals(const StopSignals&) = delete;
  // The signal that arrived, or 0.
  static int received();
};

}  // namespace tessera
