// tessera verify: a hub checkpoint against what another implementation computed from it.
#include "hf/verify.hpp"

#include <iostream>

#include "cli/verbs.hpp"
#include "train/setup.hpp"

namespace tessera {

void add_verify(CLI::App& app, Run& run) {
  struct Options {
    std::string folder, reference, dump;
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
  add_sets(*verb, o->verify.sets);
  verb->callback([o, &run] {
    run = [o] {
      const Registry registry = load_registry();
      apply_runtime(TrainingConfig{});
      const VerifyReport report = verify_hf(o->folder, o->reference, registry, o->verify);
      if (!o->dump.empty()) dump_report(report, o->dump);
      if (o->json) {
        std::cout << report_json(report).dump(1) << "\n";
      } else {
        for (const std::string& note : report.notes) std::cout << note << "\n";
        std::cout << report_text(report);
      }
      return static_cast<int>(report.num_failed() ? ExitCode::kComparison : ExitCode::kDone);
    };
  });
}

}  // namespace tessera
