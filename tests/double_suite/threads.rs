//! Clippers, reports and the functions without a clipper, in more than one thread.
