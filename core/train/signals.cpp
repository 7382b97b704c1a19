#include "train/signals.hpp"

#include <csignal>

namespace tessera {

namespace {
volatile std::sig_atomic_t g_received = 0;
struct sigaction g_old_int, g_old_term;

void on_signal(int signal) {
  if (g_received) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
  g_received = signal;
}
}  // namespace

StopSignals::StopSignals() {
  g_received = 0;
  struct sigaction action {};
  action.sa_handler = on_signal;
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  sigaction(SIGINT, &action, &g_old_int);
  sigaction(SIGTERM, &action, &g_old_term);
}

StopSignals::~StopSignals() {
  sigaction(SIGINT, &g_old_int, nullptr);
  sigaction(SIGTERM, &g_old_term, nullptr);
}

int StopSignals::received() { return g_received; }

}  // namespace tessera
