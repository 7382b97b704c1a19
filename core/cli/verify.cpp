// tessera verify: a hub checkpoint against what another implementation computed from it.
#include "hf/verify.hpp"

#include <iostream>

#include "cli/verbs.hpp"
#include "train/setup.hpp"

namespace tessera {

void add_verify(CLI::App& app, Run& run) {
  struct Options {
    std::string folder, reference, dump, mesh;
    VerifyOptions verify;
    bool json = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* verb = app.add_subcommand("verify", "forward, backward, five training steps and generation of a Hugging Face checkpoint, against a reference");
  verb->add_option("HF_DIR", o->folder, "a Hugging Face folder: config.json and safetensors")->required();
  verb->add_option("--reference", o->reference, "safetensors with input_ids [rows, tokens] and whatever is to be compared")->required()->type_name("FILE");
  verb->add_option("--dump", o->dump, "writes every tensor that was computed")->type_name("FILE");
  verb->add_option("--waive", o->verify.waived, "a key of config.json to import without; as often as wanted")->take_all()->expected(1)->allow_extra_args(false)->type_name("KEY");
  verb->add_flag("--json", o->json, "one JSON document on stdout");
  add_mesh(*verb, o->mesh);
  add_sets(*verb, o->verify.sets);
  verb->footer("Under --mesh every rank's parameter bytes and bytes sent over each axis, in the backward passes and training, are in the JSON's `ranks`. What goes over several axes at once\n"
               "counts for the first of dp_replicate, dp_shard, pp, cp, tp; exchanges among experts and etp count for ep; sums of counts and losses do not count.");
  verb->callback([o, &run] {
    run = [o] {
      const Registry registry = load_registry();
      return over_ranks(o->mesh, [&](const MeshGroups* ranks) {
        apply_runtime(TrainingConfig{}, ranks ? ranks->world().local_size : 1);
        const VerifyReport report = verify_hf(o->folder, o->reference, registry, o->verify, ranks);
        if (!is_first(ranks)) return 0;
        if (!o->dump.empty()) dump_report(report, o->dump);
        if (o->json) {
          std::cout << report_json(report).dump(1) << "\n";
        } else {
          for (const std::string& note : report.notes) std::cout << note << "\n";
          std::cout << report_text(report);
        }
        return static_cast<int>(report.num_failed() ? ExitCode::kComparison : ExitCode::kDone);
      });
    };
  });
}

}  // namespace tessera
