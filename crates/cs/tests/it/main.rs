//! The chunk server core over the real store and simulated disks, driven event by event.

mod basics;
mod daemon;
mod faults;
mod plants;
mod random;
mod rebuilds;
mod world;
