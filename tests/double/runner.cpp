// The kernels as a program of their own: no driver, no Rust, so that a sanitizer sees nothing else.
//   runner CASES      runs the cases of that file and writes the outcomes to stdout (tests/support/runner.rs)
//   runner --toy NAME runs one toy kernel, right or wrong, to show that a mistake is noticed
// Every buffer is a heap block of exactly its size.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../../kernels/abi.cuh"
#include "fibers.h"
#include "host_kernels.h"
#if defined(GRADCLIP_ASAN)
#include <sanitizer/asan_interface.h>
#endif

using namespace gradclip;
using namespace gradclip::host;

namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "runner: %s\n", what);
  std::exit(2);
}

const u32 kElementBytes[] = {4, 8, 2, 2};  // by Dtype

class Reader {
 public:
  explicit Reader(const char* path) : file_(std::fopen(path, "rb")) {
    if (!file_) fail("the case file cannot be opened");
  }
  ~Reader() { std::fclose(file_); }
  void bytes(void* out, size_t count) {
    if (count && std::fread(out, 1, count, file_) != count) fail("the case file ends early");
  }
  template <class T>
  T get() {
    T value;
    bytes(&value, sizeof value);
    return value;
  }

 private:
  std::FILE* file_;
};

void write_bytes(const void* data, size_t count) {
  if (count && std::fwrite(data, 1, count, stdout) != count) fail("stdout cannot be written");
}

// `misalign` bytes, then the data, then nothing that belongs to us.
class TensorMemory {
 public:
  TensorMemory(size_t misalign, size_t bytes) : misalign_(misalign), bytes_(bytes), block_(new char[misalign + bytes]) {
    std::memset(block_.get(), kBefore, misalign);
#if defined(GRADCLIP_ASAN)
    __asan_poison_memory_region(block_.get(), misalign / 8 * 8);  // it watches 8 bytes at a time
#endif
  }
  ~TensorMemory() {
#if defined(GRADCLIP_ASAN)
    __asan_unpoison_memory_region(block_.get(), misalign_);
#endif
    for (size_t i = 0; i < misalign_; ++i) {
      if (block_[i] != kBefore) fail("a kernel wrote before the first element of a tensor");
    }
  }
  TensorMemory(const TensorMemory&) = delete;
  TensorMemory& operator=(const TensorMemory&) = delete;

  char* data() { return block_.get() + misalign_; }
  size_t bytes() const { return bytes_; }
  u64 address() { return reinterpret_cast<u64>(data()); }

 private:
  static constexpr char kBefore = 0x5a;
  size_t misalign_, bytes_;
  std::unique_ptr<char[]> block_;
};

// Parameters of one launch, in order.
class Arguments {
 public:
  explicit Arguments(const char* symbol) : kernel_(find_kernel(symbol)), packed_(new Packed) {
    if (!kernel_) fail("no such kernel");
  }
  template <class T>
  Arguments& add(const T& value) {
    if (next_ >= kernel_->num_params || kernel_->params[next_].size != sizeof value) {
      fail("the arguments of a kernel are not those of its source");
    }
    std::memcpy(packed_->bytes + kernel_->params[next_++].offset, &value, sizeof value);
    return *this;
  }
  void run(u32 blocks, Order order) {
    if (next_ != kernel_->num_params) fail("too few arguments for a kernel");
    run_kernel(*kernel_, packed_->bytes, blocks, order);
  }

 private:
  struct alignas(16) Packed {
    char bytes[kMaxParamBytes];
  };
  const HostKernel* kernel_;
  std::unique_ptr<Packed> packed_;
  u32 next_ = 0;
};

template <class T>
std::unique_ptr<T[]> filled(size_t count) {
  std::unique_ptr<T[]> values(new T[count]);
  if (count) std::memset(static_cast<void*>(values.get()), 0xff, count * sizeof(T));
  return values;
}

// These, and what follows, as tests/support/runner.rs writes them.
enum Operation : u32 {
  kClipNorm,      // norm_partials, clip_coef, scale
  kClipNormInto,  // norm_partials, clip_coef, scale_into
  kClipWithNorm,  // clip_coef_of_norm, scale_any
  kClipValue,     // clamp, clamp_counts
  kScopedNorm,    // scoped_partials or scoped_stats, scoped_coefs or scoped_coefs_stats, scoped_scale
  kScopedValue,   // scoped_clamp, scoped_clamp_counts
  kSharded,       // norm_partials, weigh_partials, fold_partials, clip_coef_of_ranks, scale
};

struct CaseHeader {
  Operation operation;
  u32 one_group;   // of the scoped ones: for all, else one for each row
  u32 with_stats;  // of kScopedNorm
  u32 num_others;  // of kSharded: ranks after this one
  u32 table_in_memory;
  u32 with_scales;
  u32 blocks;
  u32 reversed;
  u32 num_tensors;
  u32 unused;
  ClipParams clip;
  ClampBounds bounds;
  double total_norm;
};

class Case {
 public:
  explicit Case(Reader& in) : header_(in.get<CaseHeader>()) {
    if (header_.num_tensors > kInlineTensors && !header_.table_in_memory) fail("too many tensors for an inline table");
    descs_ = filled<TensorDesc>(header_.num_tensors);
    for (u32 i = 0; i < header_.num_tensors; ++i) {
      const u32 dtype = in.get<u32>();
      const u32 misalign = in.get<u32>();
      const u64 rows = in.get<u64>();
      const u64 numel = in.get<u64>();
      if (dtype > kBF16) fail("no such dtype");
      tensors_.emplace_back(new TensorMemory(misalign, numel * kElementBytes[dtype]));
      TensorMemory& tensor = *tensors_.back();
      in.bytes(tensor.data(), tensor.bytes());
      if (header_.operation == kSharded) copies_.push_back(in.get<u32>());
      if (header_.operation == kClipNormInto) {
        const u32 output_dtype = in.get<u32>();
        const u32 output_misalign = in.get<u32>();
        if (output_dtype > kBF16) fail("no such dtype");
        outputs_.emplace_back(new TensorMemory(output_misalign, numel * kElementBytes[output_dtype]));
        std::memset(outputs_.back()->data(), kStale, outputs_.back()->bytes());
        output_descs_.push_back({outputs_.back()->address(), output_dtype, ~0u});
      }
      descs_[i] = {tensor.address(), numel, num_tiles_, dtype};
      if (!scoped()) {
        num_tiles_ += static_cast<u32>((tensor.bytes() + kTileBytes - 1) / kTileBytes);
      } else {
        add_rows(i, descs_[i], rows);
      }
    }
    if (one_group()) groups_.push_back({same_threshold(), numel(), 0, num_tiles_});
    partials_ = filled<NormPartial>(1 + header_.num_others);
    in.bytes(partials_.get() + 1, header_.num_others * sizeof(NormPartial));
    sums_ = filled<double>(num_tiles_);
    scales_ = filled<double>(num_tiles_);
    counts_ = filled<u64>(num_tiles_);
    report_ = filled<ReportSlot>(1);
    scoped_ = filled<ScopedTensor>(scoped_tensors_.size());
    std::copy(scoped_tensors_.begin(), scoped_tensors_.end(), scoped_.get());
    group_table_ = filled<ScopedGroup>(groups_.size());
    std::copy(groups_.begin(), groups_.end(), group_table_.get());
    num_stats_ = with_stats() ? header_.num_tensors : 0;
    reports_ = filled<ReportSlot>(groups_.size());
    tile_stats_ = filled<Stats>(with_stats() ? num_tiles_ : 0);
    tensor_stats_ = filled<StatsSlot>(num_stats_);
    scoped_header_ = filled<ScopedHeader>(1);
  }

  void run() {
    const Order order = {header_.reversed != 0, header_.reversed != 0};
    const u32 blocks = header_.blocks;
    if (header_.operation == kClipNorm || header_.operation == kClipNormInto) {
      run_norm_partials(blocks, order);
      const u32 norm_type = header_.clip.norm_type;
      const bool any_order = norm_type == kP;
      Arguments coef(any_order ? "clip_coef_p" : norm_type == kRms ? "clip_coef_rms" : "clip_coef");
      coef.add(sums_.get()).add(scales()).add(num_tiles_);
      if (norm_type == kRms) coef.add(numel());
      coef.add(header_.clip).add(report_.get()).run(1, order);
      if (header_.operation == kClipNorm) {
        Arguments("scale").add(table()).add(num_tiles_).add(report_.get()).run(blocks, order);
      } else {
        const u32 skip_nonfinite = header_.clip.nonfinite == kSkip;
        Arguments("scale_into")
            .add(table()).add(num_tiles_).add(output_descs_.data()).add(skip_nonfinite).add(report_.get())
            .run(blocks, order);
      }
    } else if (header_.operation == kClipWithNorm) {
      const double* const nowhere = nullptr;
      Arguments("clip_coef_of_norm")
          .add(header_.total_norm).add(nowhere).add(header_.clip).add(report_.get()).run(1, order);
      Arguments("scale_any").add(table()).add(num_tiles_).add(report_.get()).run(blocks, order);
    } else if (header_.operation == kScopedNorm) {
      run_scoped_norm(blocks, order);
    } else if (header_.operation == kScopedValue) {
      run_scoped_value(blocks, order);
    } else if (header_.operation == kSharded) {
      run_sharded(blocks, order);
    } else {
      Arguments("clamp").add(table()).add(num_tiles_).add(header_.bounds).add(counts_.get()).run(blocks, order);
      Arguments("clamp_counts").add(counts_.get()).add(num_tiles_).add(report_.get()).run(1, order);
    }
  }

  void write() {
    write_bytes(&num_tiles_, sizeof num_tiles_);
    write_bytes(sums_.get(), num_tiles_ * sizeof sums_[0]);
    write_bytes(scales_.get(), num_tiles_ * sizeof scales_[0]);
    write_bytes(counts_.get(), num_tiles_ * sizeof counts_[0]);
    write_bytes(report_.get(), sizeof(ReportSlot));
    for (const auto& tensor : tensors_) write_bytes(tensor->data(), tensor->bytes());
    for (const auto& output : outputs_) write_bytes(output->data(), output->bytes());
    if (header_.operation == kSharded) write_bytes(partials_.get(), sizeof(NormPartial));
    if (!scoped()) return;
    const u32 counts[] = {static_cast<u32>(groups_.size()), num_stats_};
    write_bytes(counts, sizeof counts);
    write_bytes(reports_.get(), groups_.size() * sizeof(ReportSlot));
    write_bytes(tensor_stats_.get(), num_stats_ * sizeof(StatsSlot));
  }

 private:
  bool scoped() const { return header_.operation == kScopedNorm || header_.operation == kScopedValue; }
  bool with_stats() const { return header_.with_stats != 0; }
  bool one_group() const { return header_.one_group != 0; }
  double* scales() { return header_.with_scales || header_.clip.norm_type == kP ? scales_.get() : nullptr; }

  u64 numel() const {
    u64 sum = 0;
    for (u32 i = 0; i < header_.num_tensors; ++i) sum += descs_[i].numel;
    return sum;
  }

  static double same_threshold() {
    double threshold;
    std::memcpy(&threshold, &kSameThreshold, sizeof threshold);
    return threshold;
  }

  // As src/scoped_plan.rs cuts a list.
  void add_rows(u32 index, const TensorDesc& desc, u64 rows) {
    if (one_group()) rows = 1;
    const u64 row_numel = rows ? desc.numel / rows : 0;
    const u64 row_bytes = row_numel * kElementBytes[desc.dtype];
    const u32 tiles = static_cast<u32>((row_bytes + kTileBytes - 1) / kTileBytes);
    const u32 first_group = one_group() ? 0 : static_cast<u32>(groups_.size());
    scoped_tensors_.push_back({desc.address, row_numel, num_tiles_, static_cast<u32>(rows) * tiles, tiles, first_group,
                               desc.dtype, index});
    for (u64 row = 0; row < rows; ++row, num_tiles_ += tiles) {
      if (!one_group()) groups_.push_back({same_threshold(), row_numel, num_tiles_, tiles});
    }
  }

  void run_norm_partials(u32 blocks, Order order) {
    static const char* const kSymbols[] = {"norm_partials_l1", "norm_partials_l2", "norm_partials_inf",
                                           "norm_partials_p", "norm_partials_l2"};
    const u32 norm_type = header_.clip.norm_type;
    if (norm_type > kRms) fail("no such norm");
    Arguments partials(kSymbols[norm_type]);
    partials.add(table()).add(num_tiles_).add(sums_.get()).add(scales());
    if (norm_type == kP) partials.add(header_.clip.p);
    partials.run(blocks, order);
  }

  void run_sharded(u32 blocks, Order order) {
    const u32 norm_type = header_.clip.norm_type;
    const bool any_order = norm_type == kP;
    const std::unique_ptr<u32[]> copies = filled<u32>(copies_.size());
    std::copy(copies_.begin(), copies_.end(), copies.get());
    run_norm_partials(blocks, order);
    if (num_tiles_ > 0) {
      Arguments("weigh_partials")
          .add(table()).add(num_tiles_).add(static_cast<const u32*>(copies.get())).add(norm_type).add(sums_.get())
          .run((num_tiles_ + kTileThreads - 1) / kTileThreads, order);
    }
    Arguments(any_order ? "fold_partials_p" : "fold_partials")
        .add(static_cast<const double*>(sums_.get())).add(static_cast<const double*>(scales())).add(num_tiles_)
        .add(norm_type).add(header_.clip.p).add(u64{kMeasured}).add(partials_.get()).add(report_.get()).run(1, order);
    Arguments(any_order ? "clip_coef_of_ranks_p" : "clip_coef_of_ranks")
        .add(static_cast<const NormPartial*>(partials_.get())).add(1 + header_.num_others).add(header_.clip)
        .add(report_.get()).run(1, order);
    Arguments("scale").add(table()).add(num_tiles_).add(report_.get()).run(blocks, order);
  }

  void run_scoped_value(u32 blocks, Order order) {
    const ScopedTable table = {scoped_.get(), header_.num_tensors};
    if (num_tiles_ > 0) {
      Arguments("scoped_clamp").add(table).add(num_tiles_).add(header_.bounds).add(counts_.get()).run(blocks, order);
    }
    const u32 num_groups = static_cast<u32>(groups_.size());
    const u64 call = 7;
    Arguments("scoped_clamp_counts")
        .add(static_cast<const ScopedGroup*>(group_table_.get())).add(num_groups)
        .add(static_cast<const u64*>(counts_.get())).add(reports_.get()).add(call).add(scoped_header_.get())
        .run(num_groups / kWarpThreads + 1, order);
    if (scoped_header_[0].call != call) fail("the header does not name the call");
  }

  void run_scoped_norm(u32 blocks, Order order) {
    static const char* const kPartials[] = {"scoped_partials_l1", "scoped_partials_l2", "scoped_partials_inf",
                                            "scoped_partials_p", "scoped_partials_l2"};
    static const char* const kStats[] = {"scoped_stats_l1", "scoped_stats_l2", "scoped_stats_inf", "scoped_stats_p",
                                         "scoped_stats_l2"};
    if (header_.clip.norm_type > kRms) fail("no such norm");
    const bool any_order = header_.clip.norm_type == kP;
    const ScopedTable table = {scoped_.get(), header_.num_tensors};
    double* const scales = this->scales();
    if (num_tiles_ > 0) {
      Arguments partials((with_stats() ? kStats : kPartials)[header_.clip.norm_type]);
      partials.add(table).add(num_tiles_).add(sums_.get()).add(scales);
      if (with_stats()) partials.add(tile_stats_.get());
      if (any_order) partials.add(header_.clip.p);
      partials.run(blocks, order);
    }
    const u32 num_groups = static_cast<u32>(groups_.size());
    const ScopedJobs jobs = {group_table_.get(), num_groups,        num_stats_,     sums_.get(),
                             scales,             tile_stats_.get(), reports_.get(), tensor_stats_.get()};
    const u64 call = 7;
    static const char* const kCoefs[2][2] = {{"scoped_coefs", "scoped_coefs_p"},
                                             {"scoped_coefs_stats", "scoped_coefs_stats_p"}};
    Arguments(kCoefs[with_stats()][any_order])
        .add(table).add(jobs).add(header_.clip).add(call).add(scoped_header_.get())
        .run((num_groups + num_stats_) / kWarpThreads + 1, order);
    if (scoped_header_[0].call != call) fail("the header does not name the call");
    if (num_tiles_ > 0) {
      Arguments("scoped_scale")
          .add(table).add(num_tiles_).add(static_cast<const ReportSlot*>(reports_.get())).run(blocks, order);
    }
  }

  // What the table does not use is 0xFF.
  TensorTable table() const {
    TensorTable table;
    std::memset(&table, 0xff, sizeof table);
    table.num_tensors = header_.num_tensors;
    table.in_memory = header_.table_in_memory ? descs_.get() : nullptr;
    if (!header_.table_in_memory && header_.num_tensors) {
      std::memcpy(table.inline_tensors, descs_.get(), header_.num_tensors * sizeof(TensorDesc));
    }
    return table;
  }

  static constexpr char kStale = 0x55;  // what an output holds before

  CaseHeader header_;
  u32 num_tiles_ = 0;
  std::vector<std::unique_ptr<TensorMemory>> tensors_;
  std::vector<std::unique_ptr<TensorMemory>> outputs_;
  std::vector<OutputDesc> output_descs_;
  std::vector<u32> copies_;
  std::unique_ptr<NormPartial[]> partials_;  // of this rank, then of the others
  std::unique_ptr<TensorDesc[]> descs_;
  std::unique_ptr<double[]> sums_;
  std::unique_ptr<double[]> scales_;
  std::unique_ptr<u64[]> counts_;
  std::unique_ptr<ReportSlot[]> report_;
  // Of the operations with more than one norm. The kernels read copies of exactly their size.
  std::vector<ScopedTensor> scoped_tensors_;
  std::vector<ScopedGroup> groups_;
  u32 num_stats_ = 0;
  std::unique_ptr<ScopedTensor[]> scoped_;
  std::unique_ptr<ScopedGroup[]> group_table_;
  std::unique_ptr<ReportSlot[]> reports_;
  std::unique_ptr<Stats[]> tile_stats_;
  std::unique_ptr<StatsSlot[]> tensor_stats_;
  std::unique_ptr<ScopedHeader[]> scoped_header_;
};

int run_cases(const char* path) {
  Reader in(path);
  const u32 count = in.get<u32>();
  for (u32 i = 0; i < count; ++i) {
    Case one(in);
    one.run();
    one.write();
  }
  return std::fflush(stdout) == 0 ? 0 : 2;
}

int run_toy(const std::string& name) {
  constexpr u32 kBlocks = 3;
  constexpr u32 kCount = kBlocks * 256;
  const auto values = filled<double>(kCount);
  for (u32 i = 0; i < kCount; ++i) values[i] = i;
  const auto sums = filled<double>(kBlocks);
  const auto words = filled<u32>(4);
  TensorMemory from(0, 256), to(0, 256);
  std::memset(from.data(), 0, from.bytes());
  if (name == "block_sums" || name == "missing_barrier") {
    Arguments(("toy_" + name).c_str()).add(values.get()).add(kCount).add(sums.get()).run(kBlocks, Order());
    std::printf("%g %g %g\n", sums[0], sums[1], sums[2]);
  } else if (name == "same_slot" || name == "block_race" || name == "unwritten_shared" || name == "shared_past_end" ||
             name == "divergent_shuffle") {
    Arguments(("toy_" + name).c_str()).add(words.get()).run(name == "block_race" ? kBlocks : 1, Order());
    std::printf("%#x\n", words[0]);
  } else if (name == "divergent_barrier") {
    Arguments("toy_divergent_barrier").run(1, Order());
  } else if (name == "copy_packs" || name == "read_past_end") {
    Arguments("toy_copy_packs").add(to.address()).add(from.address()).add(name == "copy_packs" ? 16u : 17u)
        .run(1, Order());
  } else if (name == "misaligned_pack") {
    Arguments("toy_copy_packs").add(to.address()).add(from.address() + 4).add(1u).run(1, Order());
  } else {
    fail("no such toy");
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && !std::strcmp(argv[1], "--toy")) return run_toy(argv[2]);
  if (argc == 2) return run_cases(argv[1]);
  fail("usage: runner CASES | runner --toy NAME");
}
