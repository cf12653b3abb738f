"""The model and its mathematics: knows no Ray and no storage."""

from colbert_core.allocator import collect_cycles_rarely, keep_freed_memory

keep_freed_memory()
collect_cycles_rarely()
