"""The process at work: what it may use of its machine, by which code it computes, what it alone works on, how far it is."""
