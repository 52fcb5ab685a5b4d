//! Memory accesses of four bytes at a chosen place, locked and unlocked, with every effect checked.

use core::cell::UnsafeCell;

use crate::cpu::EFLAGS_AC;
use crate::exit::Failure;
use crate::trap::{Exception, Run, unexpected, vector};
use crate::{println, probe};

/// Failures of [`happens`] and [`faults`]. Every guest that uses them may end with their codes.
pub mod failure {
    use crate::exit::Failure;

    /// 0x21
    pub const VALUE: Failure = Failure::new(0x21, "the operand in memory is wrong");
    /// 0x22
    pub const NEIGHBOURS: Failure = Failure::new(0x22, "bytes beside the operand changed");
    /// 0x23
    pub const RFLAGS: Failure = Failure::new(0x23, "the flags are wrong");
    /// 0x24
    pub const RIP: Failure =
        Failure::new(0x24, "execution did not continue at the next instruction");
    /// 0x25
    pub const REGISTER: Failure = Failure::new(0x25, "the register operand is wrong");
    /// 0x26
    pub const NO_EXCEPTION: Failure = Failure::new(0x26, "no exception where #AC was due");
    /// 0x27
    pub const WRONG_EXCEPTION: Failure =
        Failure::new(0x27, "the exception is not #AC with error code 0 at the instruction");
    /// 0x28
    pub const HAPPENED: Failure = Failure::new(0x28, "memory or register changed despite the #AC");
}

/// The instruction; its memory operand has four bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instruction {
    /// LOCK ADD of a register to memory.
    LockAdd,
    /// XCHG of a register with memory, which locks by itself.
    Xchg,
    /// ADD of a register to memory, not locked.
    Add,
    /// MOV of a register to memory, not locked.
    Store,
}

/// The place of the operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Naturally aligned.
    Aligned,
    /// Not aligned and across an 8-byte boundary, but within a cache line.
    InLine,
    /// The last four bytes of a cache line.
    LineEnd,
    /// Across two cache lines of one page, two bytes in each.
    AcrossLines,
    /// Across two pages, two bytes in each.
    AcrossPages,
}

impl Place {
    const fn offset(self) -> usize {
        match self {
            Self::Aligned => 64,
            Self::InLine => 64 + 6,
            Self::LineEnd => 64 + 60,
            Self::AcrossLines => 64 + 62,
            Self::AcrossPages => 4096 - 2,
        }
    }
}

/// A way to execute an [`Instruction`], in a mode of the processor.
pub struct Executor {
    /// First of the two pages, in bytes from 0, that the operand lies in.
    pub(crate) arena: fn() -> *mut u8,
    /// Executes the instruction on the operand at that address with that register operand and those
    /// flags.
    pub(crate) execute: fn(Instruction, *mut u8, &mut u32, u64) -> Execution,
}

/// What an [`Executor`] did.
pub(crate) struct Execution {
    pub(crate) run: Run,
    /// 1 if the instruction behind ran, once.
    pub(crate) continued: u64,
}

/// Executes where the code runs: in 64-bit mode, at the CPL that it has.
pub const HERE: Executor = Executor { arena: || ARENA.0.get().cast(), execute };

fn execute(
    instruction: Instruction,
    operand: *mut u8,
    register: &mut u32,
    rflags: u64,
) -> Execution {
    let mut value = *register;
    let mut continued = 0_u64;
    macro_rules! run {
        ($instruction:literal) => {
            // SAFETY: reads and writes the four bytes of the operand, which are the caller's.
            unsafe {
                probe!(
                    rflags,
                    [$instruction, "lea {continued}, [{continued} + 1]"],
                    operand = in(reg) operand,
                    value = inout(reg) value,
                    continued = inout(reg) continued
                )
            }
        };
    }
    let run = match instruction {
        Instruction::LockAdd => run!("lock add [{operand}], {value:e}"),
        Instruction::Xchg => run!("xchg [{operand}], {value:e}"),
        Instruction::Add => run!("add [{operand}], {value:e}"),
        Instruction::Store => run!("mov [{operand}], {value:e}"),
    };
    *register = value;
    Execution { run, continued }
}

/// Two pages, the operand somewhere in them.
#[repr(C, align(4096))]
struct Arena(UnsafeCell<[u8; 8192]>);
// SAFETY: one processor, and only `attempt` looks at it.
unsafe impl Sync for Arena {}

static ARENA: Arena = Arena(UnsafeCell::new([0; 8192]));

/// What the bytes around the operand hold.
const PATTERN: u8 = 0xA5;
/// Bytes before and behind the operand that are checked.
const MARGIN: usize = 32;

/// The arithmetic flags: CF, PF, AF, ZF, SF, OF.
const ARITHMETIC: u64 = 0x8D5;

/// Operand in memory, operand in the register, their sum, and the flags of the addition. The
/// carries go through the middle, where the operand is split.
const ADDITIONS: [(u32, u32, u32, u64); 3] = [
    (0x1111_F222, 0x0101_1303, 0x1213_0525, 0),
    (0xFFFF_FFFF, 0x0000_0001, 0x0000_0000, 0x055), // CF, PF, AF, ZF
    (0x7FFF_FFFF, 0x7FFF_FFFF, 0xFFFF_FFFE, 0x890), // AF, SF, OF
];

/// How many times [`happens`] executes its instruction.
pub const HAPPENS_EXECUTES: u32 = ADDITIONS.len() as u32;

/// One execution, and what it left.
struct Attempt {
    execution: Execution,
    memory: u32,
    register: u32,
    neighbours_intact: bool,
}

fn attempt(
    by: &Executor,
    instruction: Instruction,
    place: Place,
    (memory, mut register): (u32, u32),
    rflags: u64,
) -> Attempt {
    let start = place.offset();
    let arena = (by.arena)();
    let span = start - MARGIN..start + 4 + MARGIN;
    let operand = start..start + 4;
    for index in span.clone() {
        let byte = match index.checked_sub(start) {
            Some(byte @ 0..4) => memory.to_le_bytes()[byte],
            _ => PATTERN,
        };
        // SAFETY: every place lies in the arena with its margins.
        unsafe { arena.add(index).write_volatile(byte) };
    }
    // SAFETY: as above.
    let operand_at = unsafe { arena.add(start) };
    let execution = (by.execute)(instruction, operand_at, &mut register, rflags);
    // SAFETY: as above.
    let byte = |index: usize| unsafe { arena.add(index).read_volatile() };
    Attempt {
        execution,
        memory: u32::from_le_bytes([0, 1, 2, 3].map(|index| byte(start + index))),
        register,
        neighbours_intact: span
            .clone()
            .all(|index| operand.contains(&index) || byte(index) == PATTERN),
    }
}

/// Executes `instruction` [`HAPPENS_EXECUTES`] times with different operands. Each time it must run
/// without an exception and do what the manual says, exactly once: to memory, register and flags;
/// and the next instruction must run. An exception is [`unexpected`].
///
/// # Errors
///
/// The first deviation, see [`failure`].
pub fn happens(instruction: Instruction, place: Place) -> Result<(), Failure> {
    happens_by(&HERE, instruction, place, 0)
}

/// [`happens`] in another mode, or with further bits of RFLAGS set, such as [`EFLAGS_AC`].
///
/// # Errors
///
/// As [`happens`].
pub fn happens_by(
    by: &Executor,
    instruction: Instruction,
    place: Place,
    rflags: u64,
) -> Result<(), Failure> {
    for (memory, register, sum, sum_flags) in ADDITIONS {
        // All arithmetic flags the other way, so that each has to change or to stay.
        let before = 2 | rflags | (ARITHMETIC & !sum_flags);
        let after = attempt(by, instruction, place, (memory, register), before);
        let Execution { run, continued } = after.execution;
        if let Some(exception) = run.caught {
            println!("{instruction:?} {place:?} at {:#x}", run.at);
            unexpected(exception);
        }
        let (in_memory, in_register, flags) = match instruction {
            Instruction::LockAdd | Instruction::Add => (sum, register, sum_flags),
            Instruction::Xchg => (register, memory, before & ARITHMETIC),
            Instruction::Store => (register, register, before & ARITHMETIC),
        };
        failure::VALUE.unless(after.memory == in_memory)?;
        failure::NEIGHBOURS.unless(after.neighbours_intact)?;
        failure::REGISTER.unless(after.register == in_register)?;
        failure::RFLAGS.unless(run.rflags & ARITHMETIC == flags)?;
        failure::RIP.unless(continued == 1)?;
    }
    Ok(())
}

/// Executes `instruction` once. It must raise #AC with error code 0 at its own address and change
/// nothing: not memory, not registers, not flags. Returns the exception.
///
/// # Errors
///
/// The first deviation, see [`failure`].
pub fn faults(instruction: Instruction, place: Place) -> Result<Exception, Failure> {
    faults_by(&HERE, instruction, place, 0)
}

/// [`faults`] in another mode, or with further bits of RFLAGS set, such as [`EFLAGS_AC`].
///
/// # Errors
///
/// As [`faults`].
pub fn faults_by(
    by: &Executor,
    instruction: Instruction,
    place: Place,
    rflags: u64,
) -> Result<Exception, Failure> {
    let (memory, register, _, _) = ADDITIONS[0];
    let before = 2 | rflags | ARITHMETIC;
    let after = attempt(by, instruction, place, (memory, register), before);
    let Execution { run, continued } = after.execution;
    let Some(exception) = run.caught else {
        return Err(failure::NO_EXCEPTION);
    };
    let right = exception.vector == vector::ALIGNMENT_CHECK
        && exception.error == 0
        && exception.rip == run.at;
    if !right {
        println!("{instruction:?} {place:?} at {:#x}: {exception}", run.at);
        return Err(failure::WRONG_EXCEPTION);
    }
    failure::HAPPENED.unless(after.memory == memory && after.register == register)?;
    failure::NEIGHBOURS.unless(after.neighbours_intact)?;
    failure::RFLAGS.unless((run.rflags ^ before) & (ARITHMETIC | EFLAGS_AC) == 0)?;
    failure::RIP.unless(continued == 0)?;
    Ok(exception)
}
