//! Gradients behind raw pointers.
