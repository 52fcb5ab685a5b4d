//! Where an instruction's memory operand lies: effective address, segment, linear address.
//!
//! Source: SDM volume 1, section "Operand Addressing"; volume 3, sections "Limit Checking", "Type
//! Checking" and volume 1, "Canonical Addressing".

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

/// A segment register.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Segment {
    /// First linear address.
    pub base: u64,
    /// Highest offset, in bytes.
    pub limit: u32,
    /// Access rights as the VMCS has them: SDM volume 3, table "Format of Access Rights".
    pub rights: u32,
}

/// Access rights: expand-down (data segments only).
const EXPAND_DOWN: u32 = 1 << 2;
/// Access rights: writable (data segments only).
const WRITABLE: u32 = 1 << 1;
/// Access rights: code instead of data.
const CODE: u32 = 1 << 3;
/// Access rights: code or data, not a system segment.
const CODE_OR_DATA: u32 = 1 << 4;
/// Access rights: present.
const SEGMENT_PRESENT: u32 = 1 << 7;
/// Access rights: offsets of a stack or an expand-down segment have 32 bits.
const BIG: u32 = 1 << 14;
/// Access rights: a null selector was loaded.
const UNUSABLE: u32 = 1 << 16;

/// Order of the six segment registers, as the VMCS numbers its fields.
pub const SEGMENTS: [Register; 6] =
    [Register::ES, Register::CS, Register::SS, Register::DS, Register::FS, Register::GS];

/// How code is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CodeSize {
    /// Real mode, virtual-8086 mode, or a 16-bit code segment.
    Bits16,
    /// A 32-bit code segment.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

impl CodeSize {
    /// 16, 32 or 64.
    pub const fn bits(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }
}

/// The offset of the memory operand in its segment.
///
/// `read` gives a general register's full value by its number.
pub fn effective_address(instruction: &Instruction, read: impl Fn(usize) -> u64) -> u64 {
    let base = instruction.memory_base();
    let index = instruction.memory_index();
    let size = [base, index].into_iter().find(|register| *register != Register::None);
    // Without registers the displacement is as long as an address.
    let address_bytes = size.map_or(instruction.memory_displ_size() as usize, Register::size);
    let mask = match address_bytes {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    };
    let value = |register: Register| match register {
        // The displacement is the address already.
        Register::None | Register::RIP | Register::EIP => 0,
        register => read(register.number()),
    };
    let scaled = value(index).wrapping_mul(instruction.memory_index_scale().into());
    let sum = instruction.memory_displacement64().wrapping_add(value(base)).wrapping_add(scaled);
    sum.wrapping_add(bit_string_offset(instruction, &read)) & mask
}

/// How far the word that BTC, BTR and BTS with a register as bit number work on is from the operand:
/// the number is signed and counts bits from there.
fn bit_string_offset(instruction: &Instruction, read: impl Fn(usize) -> u64) -> u64 {
    let is_bit_string =
        matches!(instruction.mnemonic(), Mnemonic::Btc | Mnemonic::Btr | Mnemonic::Bts);
    if !is_bit_string || instruction.op1_kind() != OpKind::Register {
        return 0;
    }
    let register = instruction.op1_register();
    let number = read(register.number());
    let (number, shift) = match register.size() {
        2 => (i64::from(number as i16), 4),
        4 => (i64::from(number as i32), 5),
        _ => (number as i64, 6),
    };
    ((number >> shift) * (1 << (shift - 3))) as u64
}

/// The linear address of `size` bytes at `offset` in the operand's segment; `None` where the access
/// faults: outside the limit, not writable, not canonical.
///
/// `protected`: CR0.PE is set and the guest is not in virtual-8086 mode; `linear_bits`: how many bits a
/// canonical address has.
pub fn linear_address(
    instruction: &Instruction,
    segments: &[Segment; 6],
    code: CodeSize,
    protected: bool,
    linear_bits: u32,
    offset: u64,
    size: usize,
) -> Option<u64> {
    let register = instruction.memory_segment();
    let segment = segments[SEGMENTS.iter().position(|segment| *segment == register)?];
    let last = offset.checked_add(size as u64 - 1)?;
    if code == CodeSize::Bits64 {
        let base = match register {
            Register::FS | Register::GS => segment.base,
            _ => 0,
        };
        let first = base.wrapping_add(offset);
        let last = first.checked_add(size as u64 - 1)?;
        let unused = 64 - linear_bits;
        let canonical = |address: u64| ((address << unused) as i64 >> unused) as u64 == address;
        return (canonical(first) && canonical(last)).then_some(first);
    }
    let Segment { base, limit, rights } = segment;
    if protected {
        let wanted = CODE_OR_DATA | WRITABLE | SEGMENT_PRESENT;
        if rights & (wanted | CODE | UNUSABLE) != wanted {
            return None;
        }
    }
    let inside = if protected && rights & EXPAND_DOWN != 0 {
        let top = if rights & BIG != 0 { 0xffff_ffff } else { 0xffff };
        offset > limit.into() && last <= top
    } else {
        // With a limit of 4 GiB, an access across it may go on at offset 0: SDM volume 3, section
        // "Limit Checking".
        last <= limit.into() || limit == u32::MAX && offset <= limit.into()
    };
    inside.then_some(base.wrapping_add(offset) & 0xffff_ffff)
}

/// Size in bytes of the memory operand; 0 where it is not a plain integer.
pub fn operand_size(instruction: &Instruction) -> usize {
    match instruction.code() {
        Code::Cmpxchg16b_m128 => 16,
        _ => match instruction.memory_size().size() {
            size @ (1 | 2 | 4 | 8) => size,
            _ => 0,
        },
    }
}
