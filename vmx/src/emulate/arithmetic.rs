//! What the lockable instructions compute, and the flags that they leave.
//!
//! The CPU itself computes: each operation is executed on registers, so that flags are what this CPU
//! makes of them, those included that the manual calls undefined.

use core::arch::asm;

/// CF, PF, AF, ZF, SF and OF: the flags that these instructions can change.
pub const STATUS_FLAGS: u64 = 0x8d5;

/// The zero flag.
pub const ZF: u64 = 1 << 6;

/// An operation on memory and, but for the first four, a register or an immediate operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of the instructions")]
pub enum Operation {
    Inc,
    Dec,
    Neg,
    Not,
    Add,
    Adc,
    And,
    Or,
    Sbb,
    Sub,
    Xor,
    /// The source is a bit number; only its lowest bits, which number the operand's bits, count.
    Btc,
    Btr,
    Bts,
    Xadd,
    Xchg,
    /// The accumulator is compared; the source is what replaces the memory if both are equal.
    Cmpxchg,
}

/// What an operation leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// In memory.
    pub memory: u64,
    /// In the source register ([`Operation::Xadd`], [`Operation::Xchg`]); otherwise unchanged.
    pub source: u64,
    /// In the accumulator ([`Operation::Cmpxchg`]); otherwise unchanged.
    pub accumulator: u64,
    /// RFLAGS: [`STATUS_FLAGS`] as the operation left them, the others unchanged.
    pub flags: u64,
}

/// One instruction with the guest's flags; `$operands` follow its name.
macro_rules! execute {
    ($flags:ident, $name:literal, $operands:literal, $($operand:tt)*) => {
        // SAFETY: 1. The instruction works on registers, all of which are declared. 2. The flags that
        // are loaded are status flags only, with bit 1, which is always set; all others of RFLAGS are
        // put back as they were: interrupts stay as they are.
        unsafe {
            asm!(
                "pushfq",
                "push {flags}",
                "popfq",
                concat!($name, " ", $operands),
                "pushfq",
                "pop {flags}",
                "popfq",
                flags = inout(reg) $flags,
                $($operand)*
            )
        }
    };
}

macro_rules! operate {
    ($operation:ident, $flags:ident, $memory:ident, $source:ident, $accumulator:ident,
     $type:ty, $class:ident, $unary:literal, $binary:literal, { $($bits:tt)* }) => {{
        let mut memory = $memory as $type;
        let mut source = $source as $type;
        let mut accumulator = $accumulator as $type;
        macro_rules! unary {
            ($name:literal) => {
                execute!($flags, $name, $unary, memory = inout($class) memory)
            };
        }
        macro_rules! binary {
            ($name:literal) => {
                execute!($flags, $name, $binary, memory = inout($class) memory,
                         source = inout($class) source)
            };
        }
        match $operation {
            Operation::Inc => unary!("inc"),
            Operation::Dec => unary!("dec"),
            Operation::Neg => unary!("neg"),
            Operation::Not => unary!("not"),
            Operation::Add => binary!("add"),
            Operation::Adc => binary!("adc"),
            Operation::And => binary!("and"),
            Operation::Or => binary!("or"),
            Operation::Sbb => binary!("sbb"),
            Operation::Sub => binary!("sub"),
            Operation::Xor => binary!("xor"),
            Operation::Xadd => binary!("xadd"),
            Operation::Xchg => core::mem::swap(&mut memory, &mut source),
            Operation::Cmpxchg => {
                // In the accumulator, where the instruction expects it; a comparison sets the flags.
                let expected = accumulator;
                let mut compared = expected;
                execute!($flags, "cmp", $binary, memory = inout($class) compared,
                         source = in($class) memory);
                let _ = compared;
                if expected == memory { memory = source } else { accumulator = memory }
            }
            $($bits)*
        }
        (u64::from(memory), u64::from(source), u64::from(accumulator))
    }};
}

/// Executes `operation` on the lowest `size` (1, 2, 4, 8) bytes of its operands, whose other bytes are
/// ignored; those of the results are zero. `None` for a size that the operation does not have.
pub fn execute(
    operation: Operation,
    size: usize,
    memory: u64,
    source: u64,
    accumulator: u64,
    flags: u64,
) -> Option<Outcome> {
    let mut status = flags & STATUS_FLAGS | 2;
    let (memory, source, accumulator) = match size {
        1 => operate!(operation, status, memory, source, accumulator, u8, reg_byte,
        "{memory}", "{memory}, {source}", {
            Operation::Btc | Operation::Btr | Operation::Bts => return None,
        }),
        2 => operate!(operation, status, memory, source, accumulator, u16, reg,
        "{memory:x}", "{memory:x}, {source:x}", {
            Operation::Btc => binary!("btc"),
            Operation::Btr => binary!("btr"),
            Operation::Bts => binary!("bts"),
        }),
        4 => operate!(operation, status, memory, source, accumulator, u32, reg,
        "{memory:e}", "{memory:e}, {source:e}", {
            Operation::Btc => binary!("btc"),
            Operation::Btr => binary!("btr"),
            Operation::Bts => binary!("bts"),
        }),
        8 => operate!(operation, status, memory, source, accumulator, u64, reg,
        "{memory:r}", "{memory:r}, {source:r}", {
            Operation::Btc => binary!("btc"),
            Operation::Btr => binary!("btr"),
            Operation::Bts => binary!("bts"),
        }),
        _ => return None,
    };
    let flags = flags & !STATUS_FLAGS | status & STATUS_FLAGS;
    Some(Outcome { memory, source, accumulator, flags })
}
