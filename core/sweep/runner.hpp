// Runs the trials of a sweep, each as a process of its own.
#pragma once
#include <string>
#include <vector>

#include "sweep/sweep.hpp"

namespace tessera {

struct SweepOptions {
  bool retry = false;    // failed trials are run again
  bool yes = false;      // to many trials
  bool dry_run = false;  // shows what would be done
  bool quiet = false;
  bool slurm = false;    // writes and submits a job array; with `trial`, processes of a trial are started by srun
  std::string trial;     // only this one, as a job of the array does
  StepTime step_time;    // for [match] of step_time
};

// Trials that are done are never run again, interrupted ones go on from their checkpoint, failed ones are kept with their error. At the end, and whenever it
// is called, <folder>/results.csv has a row a trial, without what depends on the machine's mood. SIGINT and SIGTERM end it after the running steps with
// checkpoints: 130 or 143. Throws Error(kUsage) where no trial has a legal configuration, Error(kRuntime) where trials failed, or the folder cannot be written.
int run_sweep(const Sweep& sweep, const SweepOptions& options);

}  // namespace tessera
