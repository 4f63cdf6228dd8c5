//! What there is too little of: descriptors, processes, memory, room in maps; and rights that are refused.
