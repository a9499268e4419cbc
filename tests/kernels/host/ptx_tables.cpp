// Instructions of csrc/ in emulation, on inputs from test_ptx_tables.py, which takes them from the tables
// of the PTX manual.
#include <cstdio>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include "hopper.cuh"

namespace {

using cumo::emulate::machine;

template <class Values>
void write_line(const Values& values) {
  for (const auto value : values) std::printf("%g ", static_cast<double>(value));
  std::printf("\n");
}

// Input: two descriptors, then bytes of shared memory and the number stored there in fp16. Output: the
// registers of every thread, which were 1 before.
template <bool kAcrossA, bool kAcrossB>
void wgmma() {
  constexpr int kN = 128, kShared = 96 * 1024;
  uint64_t a, b;
  std::cin >> a >> b;
  std::vector<std::pair<int, float>> elements;
  int byte;
  float value;
  while (std::cin >> byte >> value) elements.push_back({byte, value});
  std::vector<std::vector<float>> registers(128);
  machine.run(1, 128, kShared, [&] {
    if (threadIdx.x == 0) {
      std::memset(machine.shared, 0, kShared);
      for (const auto& [at, number] : elements) {
        const cumo::half_t half = cumo::from_float<cumo::half_t>(number);
        std::memcpy(machine.shared + at, &half, 2);
      }
    }
    cumo::sync_block();
    float d[kN / 2];
    for (float& sum : d) sum = 1;
    cumo::wgmma<cumo::half_t, kN, kAcrossA, kAcrossB>(d, a, b);
    cumo::wgmma_commit();
    cumo::wgmma_wait<cumo::half_t, kN, 0>();
    registers[threadIdx.x].assign(d, d + kN / 2);
  });
  for (const auto& own : registers) write_line(own);
}

// Input: a source size for each copy, each in a separate group. Output: 24 bytes of shared memory at every
// copy's target, before any wait, after a wait that leaves one group pending, after a wait for all.
void cp_async() {
  std::vector<int> sizes;
  for (int size; std::cin >> size;) sizes.push_back(size);
  alignas(16) static unsigned char source[32];
  for (int i = 0; i < 32; ++i) source[i] = static_cast<unsigned char>(i + 1);
  std::vector<std::vector<int>> seen;
  machine.run(1, 1, 4096, [&] {
    std::memset(machine.shared, 0xaa, 4096);
    const auto look = [&] {
      for (size_t i = 0; i < sizes.size(); ++i)
        seen.emplace_back(machine.shared + i * 32, machine.shared + i * 32 + 24);
    };
    for (size_t i = 0; i < sizes.size(); ++i) {
      cumo::cp_async16(machine.shared + i * 32, source, sizes[i]);
      cumo::cp_async_commit();
    }
    look();
    cumo::cp_async_wait<1>();
    look();
    cumo::cp_async_wait<0>();
    look();
  });
  for (const auto& row : seen) write_line(row);
}

// Input: the count of mbarrier.init, the number of waits, and for each the step from which it waits and its
// parity; then the steps of thread 0: `arrive`, `expect BYTES` (arrive.expect_tx), `copy` (TMA, 32 bytes),
// `deliver` (wait until all copies have arrived). Output: the step after which each wait ended, and the number of
// copies that had arrived by then.
void mbarrier() {
  int count, waits;
  std::cin >> count >> waits;
  std::vector<std::pair<int, int>> of(waits);
  for (auto& [from, parity] : of) std::cin >> from >> parity;
  std::vector<std::string> steps;
  std::vector<int> bytes;
  for (std::string word; std::cin >> word;) {
    steps.push_back(word);
    bytes.push_back(0);
    if (word == "expect") std::cin >> bytes.back();
  }
  const std::vector<uint16_t> ones(16, 1);
  const cumo::TensorMap map{reinterpret_cast<const char*>(ones.data()), 1, {16}, {2}, {16}};
  std::vector<std::vector<int>> over(waits);
  machine.run(1, 1 + waits, 8192, [&] {
    auto* barrier = cumo::shared_memory<cumo::Barrier>();
    auto* copied = cumo::shared_memory<unsigned char>() + 1024;  // one row of 128 bytes each
    auto* step = cumo::shared_memory<int>() + 128;
    if (threadIdx.x == 0) {
      cumo::init_barrier(barrier, count);
      *step = 0;
    }
    cumo::sync_block();
    if (threadIdx.x > 0) {
      const auto [from, parity] = of[threadIdx.x - 1];
      machine.wait("its step", [&, from = from] { return *step >= from; });
      cumo::wait_for(barrier, parity);
      int in = 0;
      for (int i = 0; i < 4; ++i) in += copied[i * 1024] == 1;
      over[threadIdx.x - 1] = {*step, in};
      return;
    }
    int copies = 0;
    for (size_t i = 0; i < steps.size(); ++i) {
      bool again = false;
      machine.wait("the others' turn", [&] { return std::exchange(again, true); });
      if (steps[i] == "arrive") cumo::arrive(barrier);
      if (steps[i] == "expect") cumo::arrive_expecting(barrier, bytes[i]);
      if (steps[i] == "copy") cumo::tma_load(copied + copies++ * 1024, &map, barrier, 0, 0);
      if (steps[i] == "deliver") machine.wait("copies", [&] { return machine.late.empty(); });
      ++*step;
    }
  });
  for (const auto& row : over) write_line(row);
}

}  // namespace

int main(int, char** argv) {
  const std::string what = argv[1];
  if (what == "cp.async") cp_async();
  if (what == "mbarrier") mbarrier();
  if (what == "wgmma 0 0") wgmma<false, false>();
  if (what == "wgmma 0 1") wgmma<false, true>();
  if (what == "wgmma 1 0") wgmma<true, false>();
  if (what == "wgmma 1 1") wgmma<true, true>();
}
