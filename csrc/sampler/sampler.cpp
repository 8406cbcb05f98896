#include "sampler/sampler.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "common/philox.h"
#include "common/thread_pool.h"
#include "sampler/processors.h"

namespace fastgen {

namespace {

// Microseconds of one draw with GPT-2's vocabulary, roughly: they decide about threads only.
constexpr int kGreedy = 5, kFewCandidates = 15, kWholeVocabulary = 60, kWorthAThread = 100;

int cost_of(const SamplingOptions& options) {
  if (options.logprobs >= 0) return kWholeVocabulary;
  if (options.temperature == 0) return kGreedy;
  const bool few =
      options.top_k > 0 || options.top_h > 0 || (options.min_p > 0 && options.top_p == 1);
  if (options.top_n_sigma > 0) return kWholeVocabulary;
  return few ? kFewCandidates : kWholeVocabulary;
}

std::int32_t first_of(float value, const ProcessedLogits& scores) {
  for (int start = 0; start < scores.count; start += kBlock) {
    if (scores.block_highest[start / kBlock] != value) continue;
    const int end = std::min(start + kBlock, scores.count);
    for (int at = start; at < end; ++at) {
      if (scores.logits[at] == value) return at;
    }
  }
  return 0;
}

// The first index whose running sum exceeds `target`; if none does, since the sums were rounded
// otherwise, the last with a weight.
int first_beyond(const double* weights, int count, double target) {
  double running = 0;
  int last = 0;
  for (int at = 0; at < count; ++at) {
    running += weights[at];
    if (running > target) return at;
    if (weights[at] > 0) last = at;
  }
  return last;
}

}  // namespace

Sampler::Sampler(int num_seats, int vocab_size, int max_tokens, int num_threads,
                 const SamplerKernels& kernels)
    : vocab_size_(vocab_size),
      max_tokens_(max_tokens),
      num_threads_(num_threads),
      kernels_(kernels) {
  const std::size_t each = (Scratch::bytes(vocab_size) + kBlock - 1) / kBlock * kBlock;
  scratch_memory_.resize(each * num_threads + kBlock);
  const auto address = reinterpret_cast<std::uintptr_t>(scratch_memory_.data());
  unsigned char* start = scratch_memory_.data() + (kBlock - address % kBlock) % kBlock;
  for (int lane = 0; lane < num_threads; ++lane) {
    scratches_.push_back(Scratch::carve(start + lane * each, vocab_size));
  }
  reserve(num_seats);
}

std::size_t Sampler::bytes(int num_seats, int vocab_size, int max_tokens, int num_threads) {
  return (Scratch::bytes(vocab_size) + kBlock) * num_threads +
         RowHistory::bytes(max_tokens) * num_seats;
}

void Sampler::reserve(int num_seats) {
  while (static_cast<int>(seats_.size()) < num_seats) {
    seats_.push_back(std::make_unique<Seat>(max_tokens_));
  }
  runs_.reserve(seats_.size());
}

void Sampler::bind(int seat, SamplingOptions options, const std::int32_t* prompt, int prompt_len) {
  Seat& bound = *seats_[seat];
  bound.options = std::move(options);
  bound.mask.clear();
  const int ngram = std::max(0, bound.options.no_repeat_ngram_size);
  bound.row.start({bound.options.counts_seen(), ngram}, prompt, prompt_len);
}

void Sampler::draw(const DrawBatch& batch) {
  runs_.clear();
  int cost = 0;
  for (int at = 0; at < batch.count; ++at) {
    if (at == 0 || batch.seats[at] != batch.seats[at - 1]) runs_.push_back(at);
    cost += cost_of(seats_[batch.seats[at]]->options);
  }
  struct Work {
    Sampler& sampler;
    const DrawBatch& batch;
    std::atomic<std::size_t> next{0};
  } work{*this, batch};
  const auto lane = [](void* context, int index) {
    Work& shared = *static_cast<Work*>(context);
    const std::vector<int>& runs = shared.sampler.runs_;
    for (std::size_t run; (run = shared.next.fetch_add(1)) < runs.size();) {
      shared.sampler.draw_run(shared.batch, runs[run], shared.sampler.scratches_[index]);
    }
  };
  const int lanes =
      cost < kWorthAThread ? 1 : std::min(num_threads_, static_cast<int>(runs_.size()));
  run_in_parallel(lanes, lanes, lane, &work);
}

// The draws of one seat, from `first` on: each counts those before it.
void Sampler::draw_run(const DrawBatch& batch, int first, Scratch& scratch) {
  Seat& seat = *seats_[batch.seats[first]];
  bool going_on = true;
  for (int at = first; at < batch.count && batch.seats[at] == batch.seats[first]; ++at) {
    batch.ids[at] = 0;
    batch.statuses[at] = DrawStatus::kSkipped;
    if (!going_on) continue;
    const float* logits = batch.logits + static_cast<std::size_t>(at) * vocab_size_;
    batch.statuses[at] = draw_one(seat, logits, scratch, batch.ids[at]);
    if (batch.statuses[at] == DrawStatus::kFailed) {
      going_on = false;
      continue;
    }
    if (seat.options.logprobs >= 0) write_logprobs(batch, at, scratch);
    if (seat.row.num_tokens() < max_tokens_) seat.row.add(batch.ids[at]);
    going_on = batch.ids[at] == batch.drafts[at];
  }
}

DrawStatus Sampler::draw_one(const Seat& seat, const float* logits, Scratch& scratch,
                             std::int32_t& id) {
  ProcessedLogits scores;
  if (!score(seat, logits, scratch, scores)) return DrawStatus::kFailed;
  const float temperature = seat.options.temperature;
  if (temperature == 0) {
    id = first_of(scores.highest, scores);
    return DrawStatus::kDrawn;
  }
  if (!std::isfinite(scores.highest / temperature)) return DrawStatus::kFailed;
  id = filters(seat.options) ? pick_filtered(seat, scores, scratch)
                             : pick_any(seat, scores, scratch);
  return DrawStatus::kDrawn;
}

// The logits after the processors; false if there is nothing to draw from.
bool Sampler::score(const Seat& seat, const float* logits, Scratch& scratch,
                    ProcessedLogits& scores) {
  scores = {logits, vocab_size_, kernels_.highest(logits, vocab_size_, scratch.block_highest),
            scratch.block_highest};
  if (!std::isfinite(scores.highest)) return false;
  if (!changes_logits(seat.options, seat.row, seat.mask)) return true;
  std::memcpy(scratch.scores, logits, vocab_size_ * sizeof(float));
  process(seat.options, seat.row, seat.mask, scratch.scores, vocab_size_);
  scores.logits = scratch.scores;
  scores.highest = kernels_.highest(scratch.scores, vocab_size_, scratch.block_highest);
  return std::isfinite(scores.highest);
}

std::int32_t Sampler::pick_filtered(const Seat& seat, const ProcessedLogits& scores,
                                    Scratch& scratch) {
  const Candidates candidates = filtered(seat.options, scores, scratch, kernels_);
  const double target = uniform(seat.options.seed, seat.row.num_tokens()) * candidates.total;
  return candidates.ids[first_beyond(candidates.weights, candidates.count, target)];
}

std::int32_t Sampler::pick_any(const Seat& seat, const ProcessedLogits& scores, Scratch& scratch) {
  const double total = weigh_row(scores, seat.options.temperature, scratch, kernels_).total;
  const double target = uniform(seat.options.seed, seat.row.num_tokens()) * total;
  const int block = first_beyond(scratch.block_sums, num_blocks(vocab_size_), target);
  double before = 0;
  for (int at = 0; at < block; ++at) before += scratch.block_sums[at];
  const int start = block * kBlock, count = std::min(kBlock, vocab_size_ - start);
  return start + first_beyond(scratch.weights + start, count, target - before);
}

// Of the raw logits.
void Sampler::write_logprobs(const DrawBatch& batch, int at, Scratch& scratch) {
  const float* logits = batch.logits + static_cast<std::size_t>(at) * vocab_size_;
  const ProcessedLogits scores = {logits, vocab_size_,
                                  kernels_.highest(logits, vocab_size_, scratch.block_highest),
                                  scratch.block_highest};
  const double total = weigh_row(scores, 1, scratch, kernels_).total;
  const double log_total = static_cast<double>(scores.highest) + std::log(total);
  const auto logprob = [=](std::int32_t id) { return static_cast<double>(logits[id]) - log_total; };
  batch.logprobs[at] = logprob(batch.ids[at]);
  const int wanted = std::min(seats_[batch.seats[at]]->options.logprobs, batch.max_top);
  std::int32_t* top_ids = batch.top_ids + static_cast<std::size_t>(at) * batch.max_top;
  double* top_logprobs = batch.top_logprobs + static_cast<std::size_t>(at) * batch.max_top;
  std::fill(top_ids, top_ids + batch.max_top, -1);
  if (wanted == 0) return;
  const Candidates best = best_candidates(scores, 1, wanted, scratch);
  const int num_top = std::min(wanted, best.count);
  std::partial_sort(best.ids, best.ids + num_top, best.ids + best.count,
                    [=](std::int32_t left, std::int32_t right) {
                      return logits[left] > logits[right] ||
                             (logits[left] == logits[right] && left < right);
                    });
  for (int rank = 0; rank < num_top; ++rank) {
    top_ids[rank] = best.ids[rank];
    top_logprobs[rank] = logprob(best.ids[rank]);
  }
}

}  // namespace fastgen
