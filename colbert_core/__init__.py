"""The model and its mathematics: knows no Ray and no storage."""

from colbert_core.allocator import keep_freed_memory

keep_freed_memory()
