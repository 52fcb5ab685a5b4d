//! Every state that a small system can reach, by every order of steps.

use std::collections::HashSet;
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

/// Breadth first, so that what is found is found by a shortest way.
fn explore<const C: usize, const V: usize>(config: &Config<C, V>) -> Result<Covered, String> {
    let start = System::new(config);
    let mut seen = HashSet::from([start.clone()]);
    let mut states = vec![start];
    let mut came_by: Vec<Option<(usize, Op)>> = vec![None];
    let mut transitions = 0;
    let mut at = 0;
    while at < states.len() {
        let state = states[at].clone();
        for op in state.enabled(config) {
            transitions += 1;
            let next = catch_unwind(AssertUnwindSafe(|| state.step(config, op)))
                .unwrap_or_else(|_| {
                    Err(Broken { invariant: "no operation panics", detail: String::new() })
                })
                .map_err(|broken| story(config, &came_by, at, op, &broken))?;
            if !seen.contains(&next) {
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
    op: Op,
    broken: &Broken,
) -> String {
    let mut ops = vec![op];
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
    for mode in [Off, Warn, Fatal] {
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
