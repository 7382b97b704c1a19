// A safetensors file: after the byte `r` as it is, else two bytes with the length of its data (zeros) and then its header.
#include "checkpoint/safetensors.hpp"

#include <cstring>

#include "tests/fuzz/target.hpp"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tessera;
  fuzz::Bytes in(data, size);
  std::string bytes;
  if (in.take() != 'r') {
    const unsigned data_bytes = in.take16();
    const uint64_t length = in.rest().size();
    bytes.assign(8, '\0');
    std::memcpy(bytes.data(), &length, 8);
    bytes += in.rest();
    bytes.append(data_bytes, '\0');
  } else {
    bytes = in.rest();
  }
  const auto path = fuzz::folder().put("a.safetensors", bytes);
  fuzz::hold([&] {
    const SafetensorsFile file = SafetensorsFile::open(path);
    int64_t data_bytes = 0;
    for (const TensorEntry& entry : file.entries()) {
      const at::Tensor tensor = file.tensor(entry.name);
      fuzz::must(tensor.sizes() == at::IntArrayRef(entry.shape) && tensor.scalar_type() == entry.dtype, "a tensor is what its entry says");
      data_bytes += static_cast<int64_t>(tensor.nbytes());
      // Its bytes are there to be read.
      volatile char last = 0;
      if (tensor.nbytes() > 0) last = static_cast<const char*>(tensor.const_data_ptr())[tensor.nbytes() - 1];
      static_cast<void>(last);
    }
    fuzz::must(data_bytes <= static_cast<int64_t>(bytes.size()), "tensors lie in the file");
  });
  return 0;
}
