#include "common/file_reading.h"

#if defined(__unix__) || defined(__APPLE__)

#include <unistd.h>

#include <cerrno>

namespace fastgen {

bool read_at(int file, std::size_t offset, void* data, std::size_t bytes) {
  char* to = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t count = pread(file, to, bytes, static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    to += count;
    offset += static_cast<std::size_t>(count);
    bytes -= static_cast<std::size_t>(count);
  }
  return true;
}

}  // namespace fastgen

#else

namespace fastgen {

bool read_at(int, std::size_t, void*, std::size_t) { return false; }

}  // namespace fastgen

#endif
