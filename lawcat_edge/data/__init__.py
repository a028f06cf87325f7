"""Text and tasks as token ids: readers, tokenised corpora, packing, the mix that a run trains on."""
