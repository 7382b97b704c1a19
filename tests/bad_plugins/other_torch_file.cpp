// Needs a libtorch of another file name, which is not here: see CMakeLists.txt.
namespace at {
int of_another_file();
}
extern "C" __attribute__((visibility("default"))) int tessera_plugin_3() { return at::of_another_file(); }
