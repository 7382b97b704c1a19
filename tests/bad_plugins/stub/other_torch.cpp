namespace at {
__attribute__((visibility("default"))) int of_another_file();
int of_another_file() { return 1; }
}  // namespace at
