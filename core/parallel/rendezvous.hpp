// How ranks find each other: what the environment says, one store that all of them reach, and the network interface between them.
#pragma once
#include <c10/util/intrusive_ptr.h>

#include <chrono>
#include <cstdint>
#include <string>

#include "parallel/environment.hpp"
#include "parallel/mesh_groups.hpp"

namespace tessera {

// Meets the other ranks of `start` within `timeout`, which becomes World.timeout too. Rank 0 serves the store, unless the launcher does. A world of one has
// neither store nor device. Gloo's device is loopback where all ranks share this machine's network, else GLOO_SOCKET_IFNAME, else the interface that
// reaches MASTER_ADDR. local_rank and local_size are counted where the launcher does not say them.
// Throws Error(kUsage) where two ranks have one number, sizes differ, or the port cannot be served; Error(kCollective) where the address does not answer
// or ranks do not come in time, and names them.
World rendezvous(std::chrono::milliseconds timeout, const Started& start = read_start());

// Serves a store on `port` of every address of this machine, or of loopback alone. Port 0: one that the system chooses, returned in `port`.
c10::intrusive_ptr<c10d::Store> serve_store(uint16_t& port, bool loopback, std::chrono::milliseconds timeout, const std::string& port_from = "");

// The part of a store that belongs to one run, or to one restart of it (Started.attempt).
c10::intrusive_ptr<c10d::Store> run_store(c10::intrusive_ptr<c10d::Store> store, const std::string& attempt);

// What c10d says of an error, without its place in libtorch.
std::string first_line(const std::exception& error);
// This machine's name.
std::string host_name();
// What is equal on processes that reach each other by loopback, and on no others: the machine's boot and its network namespace.
std::string network_identity();

}  // namespace tessera
