#include "parallel/rendezvous.hpp"

#include <arpa/inet.h>
#include <c10/util/Logging.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <thread>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "tessera/error.hpp"

namespace tessera {

namespace {

using Clock = std::chrono::steady_clock;

// c10d's warnings come with a trace of the stack; what a user can act on comes as an Error.
void quiet_c10d() {
  if (environment_variable("TORCH_CPP_LOG_LEVEL")) c10::initLogging();
  else FLAGS_caffe2_log_level = c10::GLOG_FATAL;
}

std::string seconds(std::chrono::milliseconds time) { return fmt::format("{:g} s", static_cast<double>(time.count()) / 1000); }

struct Fd {
  int fd = -1;
  ~Fd() {
    if (fd >= 0) ::close(fd);
  }
};

int listen_on(uint16_t& port, bool loopback, const std::string& port_from) {
  for (const int family : {AF_INET6, AF_INET}) {
    if (loopback && family == AF_INET6) continue;
    Fd socket{::socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    if (socket.fd < 0) continue;  // a machine without IPv6
    const int on = 1, off = 0;
    ::setsockopt(socket.fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    sockaddr_storage address{};
    socklen_t length = sizeof(sockaddr_in);
    if (family == AF_INET6) {
      ::setsockopt(socket.fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
      auto& six = reinterpret_cast<sockaddr_in6&>(address);
      six.sin6_family = AF_INET6, six.sin6_port = htons(port), length = sizeof(sockaddr_in6);
    } else {
      auto& four = reinterpret_cast<sockaddr_in&>(address);
      four.sin_family = AF_INET, four.sin_port = htons(port), four.sin_addr.s_addr = htonl(loopback ? INADDR_LOOPBACK : INADDR_ANY);
    }
    if (::bind(socket.fd, reinterpret_cast<sockaddr*>(&address), length) != 0 || ::listen(socket.fd, SOMAXCONN) != 0) {
      if (errno == EADDRNOTAVAIL || errno == EAFNOSUPPORT) continue;
      throw Error(ExitCode::kUsage, fmt::format("{}: rank 0 cannot serve on port {}: {}", port_from, port, std::strerror(errno)), "choose another MASTER_PORT, the same for every rank");
    }
    length = sizeof address;
    ::getsockname(socket.fd, reinterpret_cast<sockaddr*>(&address), &length);
    port = ntohs(family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(address).sin6_port : reinterpret_cast<sockaddr_in&>(address).sin_port);
    return std::exchange(socket.fd, -1);
  }
  throw Error(ExitCode::kCollective, fmt::format("no socket can be opened on this machine: {}", std::strerror(errno)));
}

std::string numeric(const sockaddr* address, socklen_t length) {
  char text[NI_MAXHOST] = "";
  ::getnameinfo(address, length, text, sizeof text, nullptr, 0, NI_NUMERICHOST);
  const std::string name = text;
  return name.starts_with("::ffff:") ? name.substr(7) : name;
}

// One try: what failed, or "".
std::string try_connect(const addrinfo& to, std::string& here) {
  Fd socket{::socket(to.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
  if (socket.fd < 0) return std::strerror(errno);
  if (::connect(socket.fd, to.ai_addr, to.ai_addrlen) != 0 && errno != EINPROGRESS) return std::strerror(errno);
  pollfd ready{.fd = socket.fd, .events = POLLOUT, .revents = 0};
  if (::poll(&ready, 1, 2000) <= 0) return "no answer";
  int error = 0;
  socklen_t length = sizeof error;
  ::getsockopt(socket.fd, SOL_SOCKET, SO_ERROR, &error, &length);
  if (error) return std::strerror(error);
  sockaddr_storage address{};
  length = sizeof address;
  ::getsockname(socket.fd, reinterpret_cast<sockaddr*>(&address), &length);
  here = numeric(reinterpret_cast<sockaddr*>(&address), length);
  return "";
}

struct Route {
  std::string there, here;  // addresses as numbers: of the store, and of this machine towards it
};

// Waits until the store's address takes connections: ranks start in any order.
Route reach(const Started& start, std::chrono::milliseconds timeout) {
  const auto began = Clock::now();
  const std::string port = std::to_string(start.port);
  std::string why;
  while (true) {
    addrinfo hints{}, *found = nullptr;
    hints.ai_socktype = SOCK_STREAM;
    const int unknown = ::getaddrinfo(start.host.c_str(), port.c_str(), &hints, &found);
    const std::unique_ptr<addrinfo, void (*)(addrinfo*)> list(found, [](addrinfo* at) { at ? ::freeaddrinfo(at) : void(); });
    if (unknown) why = ::gai_strerror(unknown);
    for (const addrinfo* at = list.get(); at; at = at->ai_next) {
      Route route{.there = numeric(at->ai_addr, at->ai_addrlen), .here = ""};
      why = try_connect(*at, route.here);
      if (why.empty()) return route;
    }
    const auto waited = std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - began);
    // A name may become known late, but one that is mistyped never does.
    if (waited >= (unknown ? std::min<std::chrono::milliseconds>(timeout, std::chrono::seconds(20)) : timeout))
      throw Error(ExitCode::kCollective, fmt::format("{}: rank {} of {} reached no store there within {}: {}", start.address_from, start.rank, start.size, seconds(waited), why),
                  unknown ? "MASTER_ADDR must be a name or address of the machine of rank 0 that this machine knows"
                          : "start rank 0 too, on that machine; a firewall may stand between, or another network is needed: MASTER_ADDR, GLOO_SOCKET_IFNAME");
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
}

bool is_loopback(const std::string& address) { return address.starts_with("127.") || address == "::1"; }

// An address of this machine that others can reach: MASTER_ADDR may be a name that rank 0 itself knows as loopback.
std::string outer_address() {
  ifaddrs* list = nullptr;
  std::string found;
  if (::getifaddrs(&list) != 0) return found;
  for (const ifaddrs* at = list; at && found.empty(); at = at->ifa_next)
    if (at->ifa_addr && at->ifa_addr->sa_family == AF_INET && (at->ifa_flags & IFF_UP) && (at->ifa_flags & IFF_RUNNING) && !(at->ifa_flags & IFF_LOOPBACK))
      found = numeric(at->ifa_addr, sizeof(sockaddr_in));
  ::freeifaddrs(list);
  return found;
}

std::shared_ptr<gloo::transport::Device> choose_device(bool one_machine, const std::string& here) {
  const auto interface = environment_variable("GLOO_SOCKET_IFNAME");
  std::string host = interface ? "" : one_machine ? "127.0.0.1" : here;
  if (!interface && !one_machine && is_loopback(here)) host = outer_address();
  try {
    return gloo_device(host);
  } catch (const std::exception& error) {
    if (interface) throw Error(ExitCode::kUsage, fmt::format("GLOO_SOCKET_IFNAME={}: {}", *interface, first_line(error)), "name an interface that `ip address` lists with an address");
    throw Error(ExitCode::kCollective, fmt::format("no network interface for {}: {}", host, first_line(error)), "name one with GLOO_SOCKET_IFNAME");
  }
}

}  // namespace

std::string first_line(const std::exception& error) {
  const std::string text = error.what();
  return text.substr(0, text.find('\n'));
}

std::string host_name() {
  char name[256] = "";
  ::gethostname(name, sizeof name - 1);
  return name;
}

c10::intrusive_ptr<c10d::Store> serve_store(uint16_t& port, bool loopback, std::chrono::milliseconds timeout, const std::string& port_from) {
  quiet_c10d();
  c10d::TCPStoreOptions options;
  options.masterListenFd = listen_on(port, loopback, port_from);  // the store closes it
  options.port = port;
  options.isServer = true;
  options.waitWorkers = false;
  options.timeout = timeout;
  return c10::make_intrusive<c10d::TCPStore>("127.0.0.1", options);
}

c10::intrusive_ptr<c10d::Store> run_store(c10::intrusive_ptr<c10d::Store> store, const std::string& attempt) {
  return c10::make_intrusive<c10d::PrefixStore>("tessera/" + attempt, std::move(store));
}

std::string network_identity() {
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  char space[64] = "";
  (void)!::readlink("/proc/self/ns/net", space, sizeof space - 1);
  return host_name() + "\n" + boot + "\n" + space;
}

World rendezvous(std::chrono::milliseconds timeout, const Started& start) {
  World world{.rank = start.rank, .size = start.size, .local_rank = std::max<int64_t>(0, start.local_rank), .local_size = std::max<int64_t>(1, start.local_size), .timeout = timeout};
  if (world.size == 1) return world;
  quiet_c10d();
  const auto began = Clock::now();
  c10::intrusive_ptr<c10d::Store> store;
  auto port = static_cast<uint16_t>(start.port);
  Route route;
  try {
    if (start.serves) store = serve_store(port, false, timeout, start.address_from);
    route = reach(start, timeout);
    if (!start.serves) {
      c10d::TCPStoreOptions options;
      options.port = port;
      options.waitWorkers = false;
      options.timeout = timeout;
      store = c10::make_intrusive<c10d::TCPStore>(route.there, options);
    }
    store = run_store(std::move(store), start.attempt);

    if (store->add(fmt::format("rank/{}", world.rank), 1) > 1)
      throw Error(ExitCode::kUsage, fmt::format("{}: another process has this rank at {}", start.rank_from, start.address_from), "every process needs a rank of its own, and every run a port of its own");
    const std::string size = store->compareSet("size", "", std::to_string(world.size));
    if (size != std::to_string(world.size))
      throw Error(ExitCode::kUsage, fmt::format("{}: another process at {} says that there are {} ranks", start.rank_from, start.address_from, size), "all processes need the same number of ranks");

    store->set(fmt::format("machine/{}", world.rank), network_identity());
    std::vector<std::string> keys;
    for (int64_t rank = 0; rank < world.size; ++rank) keys.push_back(fmt::format("machine/{}", rank));
    try {
      store->wait(keys, std::max(std::chrono::milliseconds(1), timeout - std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - began)));
    } catch (const std::exception&) {
      std::vector<int64_t> absent;
      for (int64_t rank = 0; rank < world.size; ++rank)
        if (!store->check({keys[static_cast<size_t>(rank)]})) absent.push_back(rank);
      if (!absent.empty())
        throw Error(ExitCode::kCollective, fmt::format("{}: {} of {} ranks did not come to {} within {}: {}", start.rank_from, absent.size(), world.size, start.address_from, seconds(timeout), fmt::join(absent, ", ")),
                    "start them too; if they ended, their own errors say why");
    }
    const auto machines = store->multiGet(keys);
    const auto own = machines[static_cast<size_t>(world.rank)];
    const auto here = std::count(machines.begin(), machines.end(), own);
    if (start.local_rank < 0) world.local_rank = std::count(machines.begin(), machines.begin() + world.rank, own);
    if (start.local_size < 0) world.local_size = here;
    if (world.local_rank >= world.local_size)
      throw Error(ExitCode::kUsage, fmt::format("{}: the local rank is {}, but this machine has {} of the ranks", start.rank_from, world.local_rank, world.local_size), "set LOCAL_RANK and LOCAL_WORLD_SIZE both, or neither");
    world.device = choose_device(here == world.size, route.here);
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    throw Error(ExitCode::kCollective, fmt::format("{}: the store at {} failed: {}", start.rank_from, start.address_from, first_line(error)), "the process that serves it, rank 0 or the launcher, may have ended; its own error says why");
  }
  world.store = std::move(store);
  return world;
}

}  // namespace tessera
