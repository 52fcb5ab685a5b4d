//! Shares a CPU with other VMs for a while: rounds of work, long enough to be interrupted, each with
//! a split lock. Whatever the others want of split-lock detection, this guest must get what it
//! wants. Prints one line, and only at the end: where its split locks are, so that they can be told
//! from the others'.
//!
//! Words of the command line, all of which may be missing:
//!
//! | word | |
//! |---|---|
//! | `wants` | turns detection on, and expects #AC for each split lock |
//! | `declines` | leaves it off although it is offered; all split locks happen |
//! | `toggles` | turns it on, expects #AC, turns it off, the split lock happens; in each round |
//! | `held` | with `toggles`: splits no lock while detection is off |
//! | `count=N` | this many rounds, 100 without |
//! | `calm=N` | this many rounds without a split lock come first |
//!
//! Without any of the first three it does not look for detection, and all split locks happen.
//!
//! Exit codes: success; 0x1F the feature is not offered; 0x30 to 0x33, see the constants.

#![no_std]
#![no_main]

use core::arch::asm;
use core::cell::UnsafeCell;

use guests::cpu::{self, SPLIT_LOCK_DETECT, TEST_CTRL, wrmsr};
use guests::exit::{self, Failure};
use guests::trap::{Run, vector};
use guests::{Boot, guest, println, probe};

guest!(main);

const NOT_OFFERED: Failure = Failure::new(exit::NOT_OFFERED, "split-lock detection is not offered");
const NOT_WRITTEN: Failure = Failure::new(0x30, "MSR 0x33 does not hold what was written");
const NO_FAULT: Failure = Failure::new(0x31, "a split lock raised no #AC with detection on");
const FAULT: Failure = Failure::new(0x32, "a split lock did not happen");
const WRONG_SUM: Failure = Failure::new(0x33, "the sum is not that of the split locks that happen");

/// Iterations of the work in a round, two instructions each.
const WORK: u64 = 1500;

/// Two cache lines, the sum across them.
#[repr(C, align(64))]
struct Lines(UnsafeCell<[u8; 128]>);
// SAFETY: one processor, and only this file's functions use it.
unsafe impl Sync for Lines {}

static LINES: Lines = Lines(UnsafeCell::new([0; 128]));

fn sum() -> *mut u64 {
    LINES.0.get().cast::<u8>().wrapping_add(60).cast()
}

/// Adds `STEP` to the sum by a split lock. Each `STEP` is an instruction of its own, at another
/// address than any other's.
#[inline(never)]
fn add<const STEP: u8>() -> Run {
    // SAFETY: the sum lies within LINES.
    unsafe {
        probe!(2, ["lock add qword ptr [{sum}], {step}"], sum = in(reg) sum(), step = const STEP)
    }
}

fn faults(run: Run) -> Result<Run, Failure> {
    let right = run.caught.is_some_and(|exception| {
        exception.vector == vector::ALIGNMENT_CHECK
            && exception.error == 0
            && exception.rip == run.at
    });
    NO_FAULT.unless(right).map(|()| run)
}

fn happens(run: Run) -> Result<Run, Failure> {
    FAULT.unless(run.caught.is_none()).map(|()| run)
}

fn set(value: u64) -> Result<(), Failure> {
    // SAFETY: the guest splits locks only where it expects the consequence.
    let written = unsafe { wrmsr(TEST_CTRL, value) };
    NOT_WRITTEN.unless(written.is_ok() && cpu::rdmsr(TEST_CTRL) == Ok(value))
}

fn work() {
    // SAFETY: counts a register down.
    unsafe { asm!("2:", "dec {0}", "jnz 2b", inout(reg) WORK => _, options(nomem, nostack)) };
}

fn main(boot: &Boot) -> Result<(), Failure> {
    let [wants, declines, toggles, held] =
        ["wants", "declines", "toggles", "held"].map(|word| boot.has(word));
    if wants || declines || toggles {
        NOT_OFFERED.unless(cpu::offers_split_lock_detection() == Ok(true))?;
    }
    if wants {
        set(SPLIT_LOCK_DETECT)?;
    }
    (0..boot.number("calm").unwrap_or(0)).for_each(|_| work());

    let mut expected = 0;
    let mut at = [0; 2];
    for _ in 0..boot.number("count").unwrap_or(100) {
        work();
        if wants {
            at[0] = faults(add::<1>())?.at;
        } else if declines {
            at[0] = happens(add::<2>())?.at;
            expected += 2;
        } else if toggles {
            set(SPLIT_LOCK_DETECT)?;
            work();
            at[0] = faults(add::<3>())?.at;
            set(0)?;
            work();
            if !held {
                at[1] = happens(add::<4>())?.at;
                expected += 4;
            }
        } else {
            at[0] = happens(add::<5>())?.at;
            expected += 5;
        }
    }
    println!("split locks at {:#x} {:#x}", at[0], at[1]);
    // SAFETY: as in `add`; not aligned, and not locked.
    WRONG_SUM.unless(unsafe { sum().read_unaligned() } == expected)
}
