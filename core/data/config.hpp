// The [data] table.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "data/tasks/config.hpp"
#include "tessera/error.hpp"
#include "tessera/schema.hpp"

namespace tessera {

// One [[data.mixture]] table. Keys mean what they mean in [data].
struct DataComponent {
  std::string source = "bytes";
  std::string path;
  std::string text_field = "text";
  int64_t document_len = 0;
  double weight = 1;
};

// Paths are relative to the current folder. `{libtorch}` in a path stands for the include folder of the libtorch built with.
struct DataConfig {
  std::string source = "bytes";
  std::string path;
  std::string text_field = "text";
  int64_t document_len = 0;
  double validation_fraction = 0.05;
  int64_t seed = 0;
  std::vector<DataComponent> mixture;  // no key of the schema: read from [[data.mixture]]
  TaskConfig task;                     // nor is this: [data.task]
};

Schema<DataConfig> data_schema();
Schema<DataComponent> data_component_schema();

// Rules across keys. Issues are keyed "path", "document_len", "mixture", "mixture[1].path", "task.length".
void check_data(const DataConfig& config, Issues& issues);

}  // namespace tessera
