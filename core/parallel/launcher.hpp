// Several ranks of this program on this machine.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace tessera {

// Starts this program `size` times with `words` as its arguments, serves their store, and waits for all of them. Rank 0's stdin, stdout and stderr are this
// process's; the others have no stdin and no stdout, and their lines on stderr come with "[rank 2] " in front; an error that several ranks report alike
// is told once. SIGINT, SIGTERM and SIGHUP go to every rank once. When a rank fails, the others have 15 s to end by themselves, then SIGTERM and 10 s more.
// The ranks die with this process, however it dies. Returns the exit code of the first rank that failed on its own account: 128 + the signal that killed
// it, and 5 where all failed in collectives. Throws Error(kRuntime) where processes cannot be started.
int launch_ranks(int64_t size, const std::vector<std::string>& words);

}  // namespace tessera
