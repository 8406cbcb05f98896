// The sampler: one call a step draws for every row. Knows nothing of Python.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "sampler/filters.h"
#include "sampler/row_history.h"
#include "sampler/sampling_options.h"

namespace fastgen {

enum class DrawStatus : std::uint8_t {
  kDrawn = 0,
  kFailed = 1,   // NaN or infinite logits, or nothing left to draw; the id is 0
  kSkipped = 2,  // after a draw that differs from its draft
};

// Draws of one step and where their results go; every array belongs to the caller.
struct DrawBatch {
  const float* logits;         // (count, vocab_size), never changed
  const std::int32_t* seats;   // (count) neighbours with the same seat check drafts
  const std::int32_t* drafts;  // (count) the id that the seat's next draw takes for granted, or -1
  int count;
  std::int32_t* ids;      // (count)
  DrawStatus* statuses;   // (count)
  double* logprobs;       // (count) of the drawn ids, where the seat wants logprobs
  int max_top;            // columns of the next two
  std::int32_t* top_ids;  // (count, max_top) best first, -1 after the last
  double* top_logprobs;   // (count, max_top)
};

class Sampler {
 public:
  // A row has at most max_tokens tokens, prompt included.
  Sampler(int num_seats, int vocab_size, int max_tokens, int num_threads,
          const SamplerKernels& kernels);

  void reserve(int num_seats);
  void bind(int seat, SamplingOptions options, const std::int32_t* prompt, int prompt_len);
  void set_mask(int seat, IdSet mask) { seats_[seat]->mask = std::move(mask); }
  void observe(int seat, std::int32_t token_id) { seats_[seat]->row.add(token_id); }
  void draw(const DrawBatch& batch);

  int num_seats() const { return static_cast<int>(seats_.size()); }
  int vocab_size() const { return vocab_size_; }
  int max_tokens() const { return max_tokens_; }
  int num_tokens(int seat) const { return seats_[seat]->row.num_tokens(); }

  static std::size_t bytes(int num_seats, int vocab_size, int max_tokens, int num_threads);

 private:
  struct Seat {
    explicit Seat(int max_tokens) : row(max_tokens) {}
    SamplingOptions options;
    RowHistory row;
    IdSet mask;
  };

  void draw_run(const DrawBatch& batch, int first, Scratch& scratch);
  DrawStatus draw_one(const Seat& seat, const float* logits, Scratch& scratch, std::int32_t& id);
  bool score(const Seat& seat, const float* logits, Scratch& scratch, ProcessedLogits& scores);
  std::int32_t pick_filtered(const Seat& seat, const ProcessedLogits& scores, Scratch& scratch);
  std::int32_t pick_any(const Seat& seat, const ProcessedLogits& scores, Scratch& scratch);
  void write_logprobs(const DrawBatch& batch, int at, Scratch& scratch);

  int vocab_size_, max_tokens_, num_threads_;
  const SamplerKernels& kernels_;
  std::vector<std::unique_ptr<Seat>> seats_;
  std::vector<unsigned char> scratch_memory_;
  std::vector<Scratch> scratches_;  // one for each thread
  std::vector<int> runs_;           // first draw of each seat in the batch
};

}  // namespace fastgen
