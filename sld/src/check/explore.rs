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
use super::system::{Broken, Config, LIMIT, Op, System, Vm, policies_from};
use crate::Policy::{self, Emulate, Fatal, Off, Step, Warn};
use crate::SldMode;

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
                next.check_damage(config)?;
                Ok(Some(next))
            };
            let next = catch_unwind(AssertUnwindSafe(step))
                .unwrap_or_else(|_| {
                    Err(Broken { invariant: "no operation panics", detail: String::new() })
                })
                .map_err(|broken| story(config, &came_by, at, op, &broken))?;
            if let Some(next) = next {
                seen.insert(next.clone());
                states.push(next);
                came_by.push(Some((at, op)));
            }
        }
        at += 1;
    }
    Ok(Covered { systems: 1, states: states.len(), transitions })
}

/// What was done, from the start to the broken invariant.
fn story<const C: usize, const V: usize>(
    config: &Config<C, V>,
    came_by: &[Option<(usize, Op)>],
    mut at: usize,
    last: Op,
    broken: &Broken,
) -> String {
    let mut ops = vec![last];
    while let Some((from, op)) = came_by[at] {
        ops.push(op);
        at = from;
    }
    let ops: String = ops.iter().rev().map(|op| format!("  {op:?}\n")).collect();
    format!("broken: {}\n{}\n{config:?}\n{ops}", broken.invariant, broken.detail)
}

/// Hosts, and what happens to the policies of their VMs.
#[derive(Clone, Copy, Debug)]
enum Hosts {
    /// A host that warns, in which VMs keep their policy.
    Warn,
    /// Hosts that are off or fatal, in which VMs are given any policy at any time.
    OffOrFatal,
    /// A host that warns, in which they are.
    AnyPolicy,
}

impl Hosts {
    /// Their modes, with all pairs of VMs, without regard to order.
    fn pairs(self, cpus: usize) -> Vec<(SldMode, [Vm; 2])> {
        match self {
            Self::Warn => {
                // Tasks that come with their flag set have one that does something about it.
                let vms = [
                    (&[Warn], true, false),
                    (&[Warn], false, false),
                    (&[Step], false, true),
                    (&[Fatal], true, true),
                    (&[Warn], true, true),
                ]
                .map(|(policies, expose, flagged)| Vm {
                    policies,
                    expose,
                    flagged,
                });
                let after = |one: usize| vms[one..].iter().map(move |&other| [vms[one], other]);
                (0..vms.len()).flat_map(after).map(|vms| (SldMode::Warn, vms)).collect()
            }
            Self::OffOrFatal => [(SldMode::Off, Off), (SldMode::Fatal, Fatal)]
                .into_iter()
                .flat_map(|(mode, first)| any_policy(mode, [policies_from(first); 2]))
                .collect(),
            Self::AnyPolicy if cpus == 1 => any_policy(SldMode::Warn, [policies_from(Warn); 2]),
            // The two that differ in what becomes of the flag, and two of the others, which differ
            // in nothing but the verdict.
            Self::AnyPolicy => {
                any_policy(SldMode::Warn, [&[Warn, Off, Step, Fatal], &[Warn, Off, Emulate, LIMIT]])
            }
        }
    }
}

fn any_policy(mode: SldMode, policies: [&'static [Policy]; 2]) -> Vec<(SldMode, [Vm; 2])> {
    [[true, false], [false, false], [true, true]]
        .map(|expose| {
            [0, 1].map(|vm| Vm { policies: policies[vm], expose: expose[vm], flagged: false })
        })
        .map(|vms| (mode, vms))
        .into()
}

/// All systems of one topology and hardware, with these hosts.
fn explore_all<const C: usize>(core_of: [usize; C], kinds: [Kind; C], hosts: &[Hosts]) {
    let mut covered = Covered::default();
    for (mode, vms) in hosts.iter().flat_map(|hosts| hosts.pairs(C)) {
        // With one CPU both; with two, the one that the mode has to change, or in warn may.
        let boot: &[bool] = if C == 1 { &[false, true] } else { &[mode == SldMode::Off] };
        for &boot_on in boot {
            let config = Config { mode, core_of, kinds, boot_on, vms, writes_fault: false };
            covered += explore(&config).unwrap_or_else(|story| panic!("{story}"));
        }
    }
    let cores = if core_of.contains(&1) || C == 1 { "own core each" } else { "one core" };
    print(&format!("{C} CPU(s), {cores}, {kinds:?}, {hosts:?}: {covered}"));
    let mut total = TOTAL.lock().unwrap();
    *total += covered;
    print(&format!("exhaustive, in all so far: {}", *total));
}

/// Not by println!, which the test harness would swallow.
fn print(line: &str) {
    let _ = writeln!(io::stdout(), "{line}");
}

/// What all tests of this file have covered so far.
static TOTAL: Mutex<Covered> = Mutex::new(Covered { systems: 0, states: 0, transitions: 0 });

#[test]
fn one_cpu() {
    explore_all([0], [Enumerated], &[Hosts::Warn]);
}

#[test]
fn one_cpu_off_or_fatal() {
    explore_all([0], [Enumerated], &[Hosts::OffOrFatal]);
}

#[test]
fn one_cpu_any_policy() {
    explore_all([0], [Enumerated], &[Hosts::AnyPolicy]);
}

#[test]
fn one_cpu_that_does_not_enumerate() {
    explore_all([0], [IceLake], &[Hosts::Warn, Hosts::OffOrFatal]);
}

#[test]
fn two_threads_of_a_core() {
    explore_all([0, 0], [Enumerated; 2], &[Hosts::Warn]);
}

#[test]
fn two_threads_of_a_core_any_policy() {
    explore_all([0, 0], [Enumerated; 2], &[Hosts::OffOrFatal, Hosts::AnyPolicy]);
}

#[test]
fn two_cpus() {
    explore_all([0, 1], [Enumerated; 2], &[Hosts::Warn]);
}

#[test]
fn two_cpus_any_policy() {
    explore_all([0, 1], [Enumerated; 2], &[Hosts::OffOrFatal, Hosts::AnyPolicy]);
}

#[test]
fn hardware_that_lacks_or_fails() {
    for hosts in [Hosts::Warn, Hosts::OffOrFatal, Hosts::AnyPolicy] {
        for kind in [Absent, Hidden, ReadOnly, Stuck] {
            explore_all([0], [kind], &[hosts]);
        }
        for second in [Absent, Stuck] {
            explore_all([0, 1], [Enumerated, second], &[hosts]);
        }
    }
}
