// Needs what another release of libtorch has.
namespace at::_ops {
int operator_of_another_release(int);
}
extern "C" __attribute__((visibility("default"))) int tessera_plugin_3() { return at::_ops::operator_of_another_release(1); }
