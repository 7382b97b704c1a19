#include "plugin/elf.hpp"

#include <elf.h>
#include <fmt/format.h>
#include <link.h>

#include <algorithm>
#include <cstring>

#include "checkpoint/file.hpp"

namespace tessera {

namespace {

#if defined(__x86_64__)
constexpr unsigned kMachine = EM_X86_64;
#elif defined(__aarch64__)
constexpr unsigned kMachine = EM_AARCH64;
#else
#error "no ELF machine number for this architecture"
#endif

std::string name_of(unsigned machine) {
  switch (machine) {
    case EM_X86_64: return "x86-64";
    case EM_AARCH64: return "AArch64";
    case EM_386: return "x86";
    case EM_ARM: return "ARM";
    case EM_RISCV: return "RISC-V";
    case EM_PPC64: return "PowerPC 64";
    default: return fmt::format("machine {}", machine);
  }
}

}  // namespace

std::string elf_problem(const std::filesystem::path& path) {
  const MappedFile file(path);
  const auto size = static_cast<uint64_t>(file.size());
  if (size < SELFMAG || std::memcmp(file.data(), ELFMAG, SELFMAG) != 0) return "is no shared object: it does not begin as an ELF file does";
  ElfW(Ehdr) head;
  if (size < sizeof(head)) return fmt::format("is cut short: it has {} bytes, its header alone {}", size, sizeof(head));
  std::memcpy(&head, file.data(), sizeof(head));
  // The fields up to the machine lie at the same places in files of 32 bits.
  constexpr unsigned kClass = sizeof(void*) == 8 ? ELFCLASS64 : ELFCLASS32;
  if (head.e_ident[EI_DATA] != ELFDATA2LSB || head.e_ident[EI_CLASS] != kClass || head.e_machine != kMachine)
    return fmt::format("is built for {}{}, this tessera is for {}", head.e_ident[EI_DATA] == ELFDATA2LSB ? name_of(head.e_machine) : "a big-endian machine",
                       head.e_ident[EI_CLASS] == ELFCLASS32 ? " (32 bits)" : "", name_of(kMachine));
  if (head.e_type != ET_DYN) return fmt::format("is an ELF file of type {}, not a shared object", head.e_type);
  uint64_t end = head.e_phoff + uint64_t{head.e_phnum} * sizeof(ElfW(Phdr));
  if (head.e_phentsize != sizeof(ElfW(Phdr)) || end < head.e_phoff) return "is damaged: its program headers have another size than an ELF file's";
  for (unsigned i = 0; i < head.e_phnum && end <= size; ++i) {
    ElfW(Phdr) part;
    std::memcpy(&part, file.data() + head.e_phoff + i * sizeof(part), sizeof(part));
    uint64_t last = 0;
    if (__builtin_add_overflow(part.p_offset, part.p_filesz, &last)) return "is damaged: a segment ends beyond 2^64";
    if (part.p_type == PT_LOAD || part.p_type == PT_DYNAMIC) end = std::max(end, last);
  }
  if (end > size) return fmt::format("is cut short: it has {} bytes, and a part that ends at byte {}", size, end);
  return "";
}

}  // namespace tessera
