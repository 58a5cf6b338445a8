// The warm interpreter's memory, laid out so that forking it, and running in the fork, is cheap.
#pragma once

#include <cstddef>

namespace thor {

// Memory for the interpreter's small objects, from blocks that can become huge pages. Null when
// there is none, or `size` is more than one of these.
void* new_arena(std::size_t size);

// Takes all memory that malloc has free in the midst of its heap, for good: what is allocated later
// lies side by side at the heap's end, where else each chunk, and its neighbours, would be on
// another page, to be copied in a fork. Returns the bytes taken.
std::size_t fill_free_chunks();

// Backs this process's private anonymous memory by huge pages where it can: a fork then copies one
// entry instead of 512. Returns the bytes collapsed; 0 where the kernel cannot (before Linux 6.1).
std::size_t collapse_heap();

// Replaces the read-only part of the library (or program) that contains `code` by a copy of itself
// in huge pages, as far as these fit. A fork does not inherit the mappings of a file's pages and
// faults on each 64 KiB of code it comes to; one huge page is inherited whole. Returns the bytes
// moved. This process must have one thread, and must not be running that library's code: the
// caller may only be reached from it.
std::size_t move_code_to_huge_pages(const void* code);

// Gives the code of each library the same rights as the constants next to it in its file, which
// then are one mapping instead of three: a fork copies each one.
void join_file_mappings();

}  // namespace thor
