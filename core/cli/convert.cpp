// tessera convert: checkpoints from the hub's layout and to it.
#include "hf/convert.hpp"

#include <fmt/format.h>

#include <iostream>

#include "cli/limits.hpp"
#include "cli/verbs.hpp"

namespace tessera {

namespace {

at::ScalarType parse_dtype(const std::string& word) {
  if (word == "bfloat16") return at::kBFloat16;
  if (word == "float16") return at::kHalf;
  return at::kFloat;
}

}  // namespace

void add_convert(CLI::App& app, Run& run) {
  struct Options {
    std::string in, out, to, dtype;
    ConvertOptions convert;
  };
  auto o = std::make_shared<Options>();
  CLI::App* verb = app.add_subcommand("convert", "checkpoints between Hugging Face's layout and Tessera's, streamed");
  verb->add_option("IN", o->in, "a Hugging Face folder (--to tessera), or a checkpoint or run (--to hf)")->required();
  verb->add_option("OUT", o->out, "the folder to write, which must not exist")->required();
  verb->add_option("--to", o->to, "layout to write")->required()->check(CLI::IsMember({"hf", "tessera"}));
  verb->add_option("--waive", o->convert.waived, "a key of config.json to import without; as often as wanted")->take_all()->expected(1)->allow_extra_args(false)->type_name("KEY");
  verb->add_option("--dtype", o->dtype, "of all parameters; default: each as in its source")->check(CLI::IsMember({"float32", "bfloat16", "float16"}));
  verb->add_option("--max-shard-bytes", o->convert.max_shard_bytes, "data of one file")->check(whole(1));
  add_sets(*verb, o->convert.sets);
  verb->callback([o, &run] {
    run = [o] {
      const Registry registry = load_registry();
      if (!o->dtype.empty()) o->convert.dtype = parse_dtype(o->dtype);
      const auto notes = o->to == "hf" ? convert_to_hf(o->in, o->out, registry, o->convert) : convert_to_tessera(o->in, o->out, registry, o->convert);
      for (const std::string& note : notes) std::cout << note << "\n";
      return static_cast<int>(ExitCode::kDone);
    };
  });
}

}  // namespace tessera
