extern "C" __attribute__((visibility("default"))) int tessera_plugin_0() { return 0; }
