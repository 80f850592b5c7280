// Prompt lookup: what followed the best earlier occurrences of a sequence's own end. The Python side
// (gorgon_engine/drafters/ngram.py) says the same in tensor operations; the results are equal to the bit, padding
// included.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>
#include <vector>

namespace gorgon {
namespace {

struct LookupArgs {
  const int64_t* history;  // [batch, num_positions]
  const int64_t* lengths;  // [batch]
  int64_t batch, num_positions;
  const float* log_confidence;  // [max_match + 1, 3]: of the first draft, later ones, the first of a further chain
  int64_t max_match, num_chains, depth;
  int64_t* tokens;   // [batch, num_chains * depth], as all that follows
  int64_t* parents;
  float* log_probs;
  int64_t* ranks;
};

struct Place {
  int64_t end;    // position of the last matching token
  int64_t match;  // number of matching tokens; 0 = nothing to copy
};

int64_t match_at(const int64_t* row, int64_t last, int64_t end, int64_t max_match) {
  int64_t count = 0;
  while (count < max_match && count <= end && row[end - count] == row[last - count]) ++count;
  return count;
}

// The longest matches, the most recent of equals first, then the last positions without a match as padding.
void find_places(const LookupArgs& a, const int64_t* row, int64_t length, std::vector<Place>& places) {
  places.clear();
  const int64_t last = length - 1;
  const auto full = [&] { return static_cast<int64_t>(places.size()) == a.num_chains; };
  for (int64_t end = last - 1; end >= 0; --end) {
    if (row[end] != row[last]) continue;
    const int64_t match = match_at(row, last, end, a.max_match);
    if (full()) {
      if (match <= places.back().match) continue;
      places.pop_back();
    }
    const auto behind = std::find_if(places.begin(), places.end(), [&](const Place& p) { return p.match < match; });
    places.insert(behind, {end, match});
    if (full() && places.back().match == a.max_match) break;
  }
  for (int64_t end = a.num_positions - 1; !full(); --end)
    if (std::none_of(places.begin(), places.end(), [&](const Place& p) { return p.end == end; }))
      places.push_back({end, 0});
}

void write_chain(const LookupArgs& a, const int64_t* row, int64_t length, Place place, int64_t chain, int64_t out) {
  const float* confidence = a.log_confidence + 3 * place.match;
  // Chains that begin like the first are joined with it, at its confidence; where they part, theirs counts.
  const float first = confidence[chain == 0 ? 0 : 2], later = confidence[1];
  for (int64_t step = 0; step < a.depth; ++step, ++out) {
    const int64_t source = place.end + 1 + step;
    a.tokens[out] = row[std::min(source, a.num_positions - 1)];
    a.parents[out] = step == 0 ? -1 : chain * a.depth + step - 1;
    a.log_probs[out] = place.match > 0 && source < length ? first + later * static_cast<float>(step) : -INFINITY;
    a.ranks[out] = chain;
  }
}

bool lookup(const LookupArgs& a) {
  static thread_local std::vector<Place> places;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t* row = a.history + b * a.num_positions;
    if (a.lengths[b] < 0 || a.lengths[b] > a.num_positions) return false;
    find_places(a, row, a.lengths[b], places);
    for (int64_t chain = 0; chain < a.num_chains; ++chain)
      write_chain(a, row, a.lengths[b], places[chain], chain, (b * a.num_chains + chain) * a.depth);
  }
  return true;
}

}  // namespace
}  // namespace gorgon

// Null, or what is wrong with the call.
extern "C" __attribute__((visibility("default"))) const char* gorgon_lookup(const gorgon::LookupArgs* args) {
  try {
    return gorgon::lookup(*args) ? nullptr : "a length is negative or beyond the history";
  } catch (const std::bad_alloc&) {
    return "out of memory";
  }
}
