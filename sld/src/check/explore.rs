//! Every state that a small system can reach, by every order of steps.

use std::collections::HashSet;
use std::hash::{BuildHasherDefault, Hasher};
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::string::String;
use std::sync::Mutex;
use std::vec::Vec;
use std::{fmt, format, io, vec};

use super::hardware::Kind::{self, Absent, Enumerated, Hidden, IceLake, ReadOnly, Stuck};
use super::system::{Broken, Config, Op, System, Vm};
use crate::SldMode::{self, Fatal, Off, Warn};

/// States and transitions seen.
#[derive(Clone, Copy, Default)]
struct Covered {
    systems: usize,
    states: usize,
    transitions: usize,
}

impl std::ops::AddAssign for Covered {
    fn add_assign(&mut self, other: Self) {
        self.systems += other.systems;
        self.states += other.states;
        self.transitions += other.transitions;
    }
}

impl fmt::Display for Covered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { systems, states, transitions } = self;
        write!(f, "{systems} systems, {states} states, {transitions} transitions")
    }
}

/// A hash that is quick and no more: most of the time goes into looking states up.
#[derive(Default)]
struct Quick(u64);

impl Hasher for Quick {
    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    #[inline]
    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }

    #[inline]
    fn write_u32(&mut self, value: u32) {
        self.write_u64(value.into());
    }

    /// By Knuth's multiplicative hashing: an odd number near 2^64 over the golden ratio.
    #[inline]
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    #[inline]
    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }

    /// The low bits of a product depend on few of its factors' bits.
    #[inline]
    fn finish(&self) -> u64 {
        self.0.rotate_left(26)
    }
}

/// Breadth first, so that what is found is found by a shortest way.
fn explore<const C: usize, const V: usize>(config: &Config<C, V>) -> Result<Covered, String> {
    let start = System::new(config);
    let mut seen: HashSet<_, BuildHasherDefault<Quick>> = HashSet::from_iter([start.clone()]);
    let mut states = vec![start];
    let mut came_by: Vec<Option<(usize, Op)>> = vec![None];
    let mut transitions = 0;
    let mut at = 0;
    while at < states.len() {
        let state = states[at].clone();
        for op in state.enabled(config) {
            transitions += 1;
            let step = || {
                let next = state.step(config, op)?;
                if seen.contains(&next) {
                    return Ok(None);
                }
                next.check_state(config)?;
                Ok(Some(next))
            };
            let next = catch_unwind(AssertUnwindSafe(step))
                .unwrap_or_else(|_| {
                    Err(Broken { invariant: "no operation panics", detail: String::new() })
                })
                .map_err(|broken| story(config, &came_by, at, Some(op), &broken))?;
            if let Some(next) = next {
                seen.insert(next.clone());
                states.push(next);
                came_by.push(Some((at, op)));
            }
        }
        at += 1;
    }
    for (at, state) in states.iter().enumerate() {
        state.check_damage(config).map_err(|broken| story(config, &came_by, at, None, &broken))?;
    }
    Ok(Covered { systems: 1, states: states.len(), transitions })
}

/// What was done, from the start to the broken invariant.
fn story<const C: usize, const V: usize>(
    config: &Config<C, V>,
    came_by: &[Option<(usize, Op)>],
    mut at: usize,
    last: Option<Op>,
    broken: &Broken,
) -> String {
    let mut ops = Vec::from_iter(last);
    while let Some((from, op)) = came_by[at] {
        ops.push(op);
        at = from;
    }
    let ops: String = ops.iter().rev().map(|op| format!("  {op:?}\n")).collect();
    format!("broken: {}\n{}\n{config:?}\n{ops}", broken.invariant, broken.detail)
}

/// The VMs that a mode allows.
fn vms(mode: SldMode) -> Vec<Vm> {
    let policies: &[Option<SldMode>] = if mode == Warn { &[None, Some(Fatal)] } else { &[None] };
    let mut vms = Vec::new();
    for &own in policies {
        for expose in [false, true] {
            vms.push(Vm { own, expose, flagged: false });
            // Only in warn are there flags; and an unaware guest does nothing about its task's.
            if mode == Warn && (expose || own.is_some()) {
                vms.push(Vm { own, expose, flagged: true });
            }
        }
    }
    vms
}

/// All systems of one topology and hardware: every mode, every pair of VMs (without regard to
/// order).
fn explore_all<const C: usize>(core_of: [usize; C], kinds: [Kind; C]) -> Result<Covered, String> {
    let mut covered = Covered::default();
    // Warn last: it has most of the states.
    for mode in [Off, Fatal, Warn] {
        // With one CPU both; with two, the one that the mode has to change, or in warn may.
        let boot: &[bool] = if C == 1 { &[false, true] } else { &[mode == Off] };
        for &boot_on in boot {
            let vms = vms(mode);
            for (index, &one) in vms.iter().enumerate() {
                for &other in &vms[index..] {
                    let vms = [one, other];
                    covered += explore(&Config {
                        mode,
                        core_of,
                        kinds,
                        boot_on,
                        vms,
                        writes_fault: false,
                    })?;
                }
            }
        }
    }
    let cores = if core_of.contains(&1) || C == 1 { "own core each" } else { "one core" };
    print(&format!("{C} CPU(s), {cores}, {kinds:?}: {covered}"));
    Ok(covered)
}

/// Not by println!, which the test harness would swallow.
fn print(line: &str) {
    let _ = writeln!(io::stdout(), "{line}");
}

/// What all tests of this file have covered so far.
static TOTAL: Mutex<Covered> = Mutex::new(Covered { systems: 0, states: 0, transitions: 0 });

fn check(outcome: Result<Covered, String>) {
    let covered = outcome.unwrap_or_else(|story| panic!("{story}"));
    let mut total = TOTAL.lock().unwrap();
    *total += covered;
    print(&format!("exhaustive, in all so far: {}", *total));
}

#[test]
fn one_cpu() {
    check(explore_all([0], [Enumerated]));
}

#[test]
fn one_cpu_that_does_not_enumerate() {
    check(explore_all([0], [IceLake]));
}

#[test]
fn two_threads_of_a_core() {
    check(explore_all([0, 0], [Enumerated; 2]));
}

#[test]
fn two_cpus() {
    check(explore_all([0, 1], [Enumerated; 2]));
}

#[test]
fn hardware_that_lacks_or_fails() {
    for kind in [Absent, Hidden, ReadOnly, Stuck] {
        check(explore_all([0], [kind]));
    }
    for second in [Absent, Stuck] {
        check(explore_all([0, 1], [Enumerated, second]));
    }
}
