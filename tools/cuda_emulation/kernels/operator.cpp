// What the concept RowOperator accepts and rejects: each rejected operator lacks one thing.
#include "cuda/rows/operator.cuh"

#include "harness.h"

namespace fastnn::cuda::tests {
namespace {

struct WritesOnes : RowDefaults {
  using T = float;
  struct Row {};

  template <int N>
  void map(const Row&, Classes, const float (&)[1][N], float (&out)[N]) const {
    for (float& value : out) value = 1;
  }
};
static_assert(RowOperator<WritesOnes>);

struct HasNoMap : RowDefaults {
  using T = float;
  struct Row {};
};
static_assert(!RowOperator<HasNoMap>);

struct HasNoOutput : HasNoMap {
  static constexpr bool kMaps = false;
};
static_assert(RowOperator<HasNoOutput>);

struct MapsAnotherNumberOfOperands : WritesOnes {
  static constexpr int kMapInputs = 2;
};
static_assert(!RowOperator<MapsAnotherNumberOfOperands>);

struct CopiesWithoutReading : HasNoOutput {
  static constexpr bool kCopies = true;
};
static_assert(!RowOperator<CopiesWithoutReading>);

struct HasNoFinish : WritesOnes {
  using State = SumState<float>;
  static constexpr int kReduceInputs = 1;
};
static_assert(!RowOperator<HasNoFinish>);

struct Sums : HasNoFinish {
  void finish(Row&, const SumState<float>&, int64_t) const {
  }
};
static_assert(RowOperator<Sums>);

struct Copies : Sums {
  static constexpr bool kMaps = false, kCopies = true;
};
static_assert(RowOperator<Copies>);

struct HasNoState : WritesOnes {
  using State = float;
};
static_assert(!RowOperator<HasNoState>);

struct HasNoRow : RowDefaults {
  using T = float;
  static constexpr bool kMaps = false;
};
static_assert(!RowOperator<HasNoRow>);

struct BeginsAsBefore : WritesOnes {
  Row begin(int64_t) const {
    return {};
  }
};
static_assert(!RowOperator<BeginsAsBefore>);

struct SkipsWithoutAnAnswer : WritesOnes {
  void skips(const Row&) const {
  }
};
static_assert(!RowOperator<SkipsWithoutAnAnswer>);

struct ReportsToNothing : WritesOnes {
  void report(const Row&, int64_t) const {
  }
};
static_assert(!RowOperator<ReportsToNothing>);

const Test test("what RowDefaults says", [] {
  WritesOnes::Row row;
  LossSums sums = LossSums::none();
  WritesOnes own;
  own.start();
  const WritesOnes op;
  op.begin(row, 0);
  op.read_ahead(row, 0);
  op.report(row, 0, sums);
  op.conclude(sums);
  expect(!op.is_done() && !op.skips(row) && sums.weight == 0, "nothing is left out or added");
});

}  // namespace
}  // namespace fastnn::cuda::tests
