//! The crate against a model of the hardware: every order of operations in small systems, random
//! long ones in larger systems, and threads that really run at the same time.
//!
//! [`hardware`] knows what 0x33 is and nothing of this crate; [`system`] is a hypervisor reduced
//! to what it may do and in which order, and the invariants; [`damage`] is what
//! [`verify`](crate::verify) must notice. `tests/mutants.rs` shows that they
//! have teeth: it builds this crate with faults seeded and expects [`explore`] to find each.

mod damage;
mod explore;
mod hardware;
mod probe;
mod sequences;
mod system;
mod threads;
