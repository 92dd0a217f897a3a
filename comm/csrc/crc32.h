// CRC-32 as zlib computes it (polynomial 0xEDB88320, reflected).
#pragma once

#include <cstddef>
#include <cstdint>

namespace remora {

// Continues `crc` (0 to begin) over `size` bytes; equals `zlib.crc32(data, crc)`.
uint32_t crc32(uint32_t crc, const void* data, size_t size);

}  // namespace remora
