#include "sweep/runner.hpp"

#include "cli/calibration.hpp"
#include "cli/verbs.hpp"

namespace tessera {

void add_sweep(CLI::App& app, Run& run) {
  struct Options {
    std::string file, launcher = "local", calibration;
    SweepOptions sweep;
  };
  auto o = std::make_shared<Options>();
  CLI::App* verb = app.add_subcommand("sweep", "trains what axes over a base configuration make: runs what is missing, and shows one table");
  verb->add_option("SWEEP", o->file, "a TOML file")->required();
  verb->add_flag("--dry-run", o->sweep.dry_run, "lists the trials, or shows the job, and runs nothing");
  verb->add_flag("--retry", o->sweep.retry, "runs failed trials again");
  verb->add_flag("--yes", o->sweep.yes, "to more than a thousand trials");
  verb->add_flag("--quiet", o->sweep.quiet, "the table alone");
  verb->add_option("--launcher", o->launcher, "local: on this machine; slurm: writes and submits a job array")->capture_default_str()->check(CLI::IsMember({"local", "slurm"}));
  verb->add_option("--trial", o->sweep.trial, "runs this trial alone")->type_name("NAME");
  add_calibration(*verb, o->calibration);
  verb->callback([o, &run] {
    run = [o] {
      o->sweep.step_time = predicted_step_time(o->calibration);
      o->sweep.slurm = o->launcher == "slurm";
      return run_sweep(read_sweep(o->file), o->sweep);
    };
  });
}

}  // namespace tessera
