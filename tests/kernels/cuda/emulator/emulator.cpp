#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <random>

#ifndef __x86_64__
#error "the emulator's stack switch is written for x86-64"
#endif

asm(R"(
.text
.globl fastres_emulator_switch
.hidden fastres_emulator_switch
.type fastres_emulator_switch, @function
fastres_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void fastres_emulator_switch(void** save, void* load);

namespace emulator {

Thread* self = nullptr;
Run* run = nullptr;
bool late = false, late_products = false;

namespace {

constexpr size_t kStack = 64 << 10;
constexpr int kConcurrent = 4;  // clusters of a grid in flight, so that work taken from a shared counter is really shared

unsigned seed = 0;
std::mutex running;
std::map<const void*, unsigned> dynamic_shared;  // limits, by function
void* scheduler_stack = nullptr;
std::vector<unsigned char*> free_stacks;

unsigned char* take_stack() {
  if (!free_stacks.empty()) {
    unsigned char* stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for a fiber");
  return static_cast<unsigned char*>(memory);
}

void leave() { fastres_emulator_switch(&self->stack_pointer, scheduler_stack); }

void enter() {
  try {
    const Call& call = *self->block->owner->call;
    call.invoke(call.function, call.parameters);
    for (auto& group : self->groups)
      for (auto& copy : group) copy.perform();
    for (auto& group : self->stores)
      for (auto& store : group) store();
  } catch (const std::exception& e) {
    if (run->error.empty()) run->error = e.what();
  }
  self->done = true;
  for (;;) leave();
}

void prepare(Thread& t, unsigned char* stack) {
  // What the switch pops: six registers, then the address to return to; the stack then stands as after a call.
  auto* top = reinterpret_cast<void**>(stack + kStack - 56);
  top[0] = nullptr;
  *--top = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  t.stack_pointer = top;
}

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Meeting barrier;
  std::vector<unsigned char*> stacks;
  std::vector<Thread*> order;
  size_t alive = 0;
  Grid* owner() const { return blocks[0]->owner; }
};

std::unique_ptr<Cluster> make_cluster(Grid* owner, std::mt19937& random) {
  const auto& [name, function, invoke, parameters, grid, size, shared_bytes, cluster, overlap] = *owner->call;
  const size_t number = owner->next++;
  auto c = std::make_unique<Cluster>();
  const unsigned threads = size.x * size.y * size.z;
  c->barrier.size = cluster * threads;
  c->barrier.slot.resize(c->barrier.size);
  for (unsigned rank = 0; rank < cluster; ++rank) {
    auto b = std::make_unique<Block>();
    b->owner = owner;
    const size_t linear = number * cluster + rank;
    b->index = dim3(linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y);
    b->grid = grid;
    b->size = size;
    b->rank = rank;
    b->cluster = cluster;
    // Poison, so that reading what nobody wrote shows: 0xff bytes are NaN in every float type.
    b->memory.assign(shared_bytes + 1024, 0xff);
    b->shared = b->memory.data() + (1024 - reinterpret_cast<uintptr_t>(b->memory.data()) % 1024) % 1024;
    b->shared_bytes = shared_bytes;
    b->threads.resize(threads);
    b->alive = threads;
    b->warps.resize((threads + 31) / 32);
    b->warpgroups.resize((threads + 127) / 128);
    b->barriers.resize(16);
    b->whole_cluster = &c->barrier;
    for (size_t w = 0; w < b->warps.size(); ++w) b->warps[w].size = std::min(32u, threads - 32 * unsigned(w));
    for (auto& w : b->warps) w.slot.resize(32);
    for (auto& w : b->warpgroups) w.size = 128, w.slot.resize(128);
    for (auto& w : b->barriers) w.slot.resize(threads);
    for (unsigned i = 0; i < threads; ++i) {
      Thread& t = b->threads[i];
      t.index = uint3{i % size.x, i / size.x % size.y, i / size.x / size.y};
      t.linear = i;
      t.lane = i % 32;
      t.warp = i / 32;
      t.block = b.get();
      c->stacks.push_back(take_stack());
      prepare(t, c->stacks.back());
      c->order.push_back(&t);
    }
    c->blocks.push_back(std::move(b));
  }
  for (auto& b : c->blocks)
    for (auto& peer : c->blocks) b->peers.push_back(peer.get());
  if (seed) std::shuffle(c->order.begin(), c->order.end(), random);
  c->alive = c->order.size();
  return c;
}

std::string waiting(const std::vector<std::unique_ptr<Cluster>>& live) {
  std::map<std::string, int> places;
  for (auto& c : live)
    for (Thread* t : c->order)
      if (!t->done) ++places[t->where];
  std::string text = "deadlock; waiting at";
  for (auto& [place, count] : places) text += " " + place + " x" + std::to_string(count);
  return text;
}

}  // namespace

void fail(const std::string& message) {
  const Thread& t = *self;
  throw std::runtime_error("emulated kernel: " + message + " (block " + std::to_string(t.block->index.x) + ", thread " +
                           std::to_string(t.linear) + ", last wait: " + t.where + ")");
}

void yield() { leave(); }

void set_dynamic_shared(const void* function, int bytes) {
  std::lock_guard<std::mutex> lock(running);
  dynamic_shared[function] = static_cast<unsigned>(bytes);
}

void launch(const std::vector<Call>& row) {
  if (row.empty()) return;
  std::lock_guard<std::mutex> lock(running);
  std::vector<Grid> grids(row.size());
  for (size_t i = 0; i < row.size(); ++i) {
    const auto& [name, function, invoke, parameters, grid, block, shared_bytes, cluster, overlap] = row[i];
    const auto refuse = [&](bool wrong, const char* what) {
      if (wrong) throw std::runtime_error("records[" + std::to_string(i) + "] " + name + ": emulated kernel: " + what);
    };
    refuse(shared_bytes > 227 * 1024, "more than 227 KB of shared memory");
    refuse(shared_bytes > 48 * 1024 && (!dynamic_shared.count(function) || shared_bytes > dynamic_shared[function]),
           "more shared memory than the function's limit");
    refuse(grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535, "invalid grid");
    refuse(cluster > 8 || grid.x % (cluster ? cluster : 1), "invalid cluster");
    grids[i].call = &row[i];
    grids[i].blocks = size_t(grid.x) * grid.y * grid.z;
    grids[i].before = i ? &grids[i - 1] : nullptr;
  }
  Run state;
  run = &state;
  std::mt19937 random(seed);
  std::vector<std::unique_ptr<Cluster>> live;
  const auto release = [&](Cluster& c) {
    free_stacks.insert(free_stacks.end(), c.stacks.begin(), c.stacks.end());
  };
  while (state.error.empty() && !grids.back().done()) {
    for (Grid& g : grids)
      for (; g.may_start() && g.next * g.call->cluster < g.blocks && g.live < kConcurrent; ++g.live)
        live.push_back(make_cluster(&g, random));
    // Successors first: what they do too early, they do before their predecessor.
    std::stable_sort(live.begin(), live.end(), [](auto& a, auto& b) { return a->owner() > b->owner(); });
    bool moved = false;
    for (auto& c : live) {
      for (Thread* t : c->order) {
        if (t->done || (t->ready && !t->ready(t->argument))) continue;
        t->ready = nullptr;
        self = t;
        fastres_emulator_switch(&scheduler_stack, t->stack_pointer);
        moved = true;
        if (t->done) --c->alive, --t->block->alive;
        if (!state.error.empty()) break;
      }
      if (!state.error.empty()) break;
    }
    for (size_t i = 0; i < live.size();) {
      if (live[i]->alive == 0) {
        for (; !state.pending.empty(); state.pending.pop_front()) state.pending.front()();
        Grid& g = *live[i]->owner();
        for (auto& b : live[i]->blocks) g.signalled += !b->signalled;
        g.finished += live[i]->blocks.size();
        --g.live;
        release(*live[i]);
        live.erase(live.begin() + i);
      } else {
        ++i;
      }
    }
    if (!moved && state.error.empty()) {
      if (state.pending.empty()) {
        state.error = "emulated kernel: " + waiting(live);
      } else {
        state.pending.front()();
        state.pending.pop_front();
      }
    }
  }
  for (auto& c : live) release(*c);
  run = nullptr;
  self = nullptr;
  if (!state.error.empty()) throw std::runtime_error(state.error);
}

}  // namespace emulator

// order: 0 runs threads by number, else shuffled with this seed. late: bit 0 copies, bit 1 products of wgmma, as late
// as they may happen.
extern "C" __attribute__((visibility("default"))) void emulator_configure(unsigned order, int late) {
  emulator::seed = order;
  emulator::late = late & 1;
  emulator::late_products = late & 2;
}
