//! Splits a lock at every privilege level and in the two 16-bit modes, with each combination of
//! CR0.AM and EFLAGS.AC: all that a verdict on #AC is made of, but the hypervisor's mode. Silent
//! unless something is wrong.
//!
//! Words of the command line, all of which may be missing:
//!
//! | word | |
//! |---|---|
//! | `cpl0` `cpl1` `cpl2` `cpl3` `real` `vm86` | only there, as many as are given |
//! | `am=0` `am=1`, `ac=0` `ac=1` | only with this value |
//! | `bit=1` | turns detection on first, and expects #AC for each |
//! | `faults` | expects #AC for each although nothing says that there is detection |
//!
//! Otherwise it expects #AC where legacy alignment checking raises it, and elsewhere that the split
//! locks happen.
//!
//! Exit codes: success; 0x1F the feature is not offered; [`split::failure`]; 0x30 MSR 0x33 does not
//! hold what was written; 0x31 the #AC came from another CPL.

#![no_std]
#![no_main]

use guests::cpu::{self, CR0_AM, EFLAGS_AC, SPLIT_LOCK_DETECT, TEST_CTRL, wrmsr};
use guests::exit::{self, Failure};
use guests::ring::{Ring, in_ring};
use guests::sixteen::{REAL, VM86};
use guests::split::{self, Executor, HERE, Instruction, Place};
use guests::{Boot, guest};

guest!(main);

const NOT_OFFERED: Failure = Failure::new(exit::NOT_OFFERED, "split-lock detection is not offered");
const NOT_WRITTEN: Failure = Failure::new(0x30, "MSR 0x33 does not hold what was written");
const WRONG_CPL: Failure = Failure::new(0x31, "the #AC came from another CPL");

/// Where a lock is split: the word for it, the ring to go to, how to execute there, the CPL that it
/// counts as.
struct From(&'static str, Option<Ring>, &'static Executor, u8);

const FROM: [From; 6] = [
    From("cpl0", None, &HERE, 0),
    From("cpl1", Some(Ring::One), &HERE, 1),
    From("cpl2", Some(Ring::Two), &HERE, 2),
    From("cpl3", Some(Ring::Three), &HERE, 3),
    From("real", None, &REAL, 0),
    From("vm86", None, &VM86, 3),
];

fn main(boot: &Boot) -> Result<(), Failure> {
    let bit = boot.number("bit") == Some(1);
    if bit {
        NOT_OFFERED.unless(cpu::offers_split_lock_detection() == Ok(true))?;
        // SAFETY: the guest splits locks only where it expects the consequence.
        let written = unsafe { wrmsr(TEST_CTRL, SPLIT_LOCK_DETECT) };
        NOT_WRITTEN.unless(written.is_ok() && cpu::rdmsr(TEST_CTRL) == Ok(SPLIT_LOCK_DETECT))?;
    }
    let all_faults = bit || boot.has("faults");
    let everywhere = !FROM.iter().any(|from| boot.has(from.0));
    for from in FROM.iter().filter(|from| everywhere || boot.has(from.0)) {
        for (am, ac) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let given = |name, value| boot.number(name).is_none_or(|only| only == value);
            if given("am", am) && given("ac", ac) {
                let legacy = from.3 == 3 && am == 1 && ac == 1;
                split_lock(from, am == 1, ac == 1, all_faults || legacy)?;
            }
        }
    }
    Ok(())
}

fn split_lock(from: &From, am: bool, ac: bool, faults: bool) -> Result<(), Failure> {
    let &From(_, ring, executor, cpl) = from;
    let cr0 = cpu::cr0() & !CR0_AM | if am { CR0_AM } else { 0 };
    // SAFETY: AM counts only where EFLAGS.AC is set, for the instruction below.
    unsafe { cpu::set_cr0(cr0) };
    let rflags = if ac { EFLAGS_AC } else { 0 };
    let (instruction, place) = (Instruction::LockAdd, Place::AcrossLines);
    let attempt = || {
        if faults {
            let exception = split::faults_by(executor, instruction, place, rflags)?;
            WRONG_CPL.unless(exception.cpl == cpl)
        } else {
            split::happens_by(executor, instruction, place, rflags)
        }
    };
    match ring {
        None => attempt(),
        Some(ring) => in_ring(ring, attempt),
    }
}
