//! The consensus core through its public interface: a cluster in one thread, crash enumeration, planted bugs.

mod crash;
mod disk;
mod runs;
mod solo;
mod world;
