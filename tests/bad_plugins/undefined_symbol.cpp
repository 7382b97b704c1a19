extern "C" int nobody_defines_this();
extern "C" __attribute__((visibility("default"))) int tessera_plugin_3() { return nobody_defines_this(); }
