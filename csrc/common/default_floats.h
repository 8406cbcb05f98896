// Results must not depend on how the calling thread has set up floating-point arithmetic, e.g. to
// flush denormals or to round upwards: other threads do parts of the same work.

#pragma once

#include <cfenv>

namespace fastgen {

// The default rounding, denormals included, until the end of the scope.
class DefaultFloats {
 public:
  DefaultFloats() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloats() { std::fesetenv(&before_); }
  DefaultFloats(const DefaultFloats&) = delete;
  DefaultFloats& operator=(const DefaultFloats&) = delete;

 private:
  std::fenv_t before_;
};

}  // namespace fastgen
