//! Layer L1: the store against a model, through every crash and fault one disk can have.

mod crash;
mod harness;
mod model;
mod smoke;
