//! Segments: a code and a data segment for each ring, 32-bit and 16-bit ones for the way out of
//! long mode, the TSS.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::area::{self, MAX_CPUS};

/// Selector of ring `ring`'s 64-bit code segment, its RPL included.
pub const fn code(ring: u16) -> u16 {
    (0x08 + 0x10 * ring) | ring
}

/// Selector of ring `ring`'s data segment, its RPL included.
pub const fn data(ring: u16) -> u16 {
    (0x10 + 0x10 * ring) | ring
}

/// Selector of the 32-bit code segment of ring 0.
pub const CODE32: u16 = 0x48;
/// Selector of the 16-bit code segment: base 0, limit 64 KiB, as real mode needs it.
pub(crate) const CODE16: u16 = 0x50;
/// Selector of the 16-bit data segment: base 0, limit 64 KiB.
pub(crate) const DATA16: u16 = 0x58;
/// Selector of the first CPU's 64-bit TSS, which takes two entries.
const TSS: u16 = 0x60;
/// Selector of the 32-bit TSS that virtual-8086 mode needs.
pub(crate) const TSS32: u16 = 0x70;
/// Selector of the 32-bit code segment of ring 3, its RPL included.
pub const CODE32_RING3: u16 = 0x78 | 3;
/// Selector of a 16-bit code segment of ring 0: base 0, limit 4 GiB.
pub const CODE16_FLAT: u16 = 0x80;
/// Index of the second CPU's 64-bit TSS; those of the others follow.
const OTHER_TSS: usize = 17;
/// Entries of the GDT.
pub(crate) const GDT_ENTRIES: usize = OTHER_TSS + 2 * (MAX_CPUS - 1);

/// Index of the IST stack of interrupts and of every exception but #DF.
pub(crate) const IST_EXCEPTION: u64 = 1;
/// Index of the IST stack of #DF.
pub(crate) const IST_DOUBLE_FAULT: u64 = 2;
/// Index of the IST stack of NMIs, which arrive while exceptions and interrupts are handled.
pub(crate) const IST_NMI: u64 = 3;

// Flat segments, present and with the accessed bit already set: the processor sets that bit by a
// locked access of its own.
const CODE64_SEGMENT: u64 = 0x00AF_9B00_0000_FFFF;
const CODE32_SEGMENT: u64 = 0x00CF_9B00_0000_FFFF;
const DATA_SEGMENT: u64 = 0x00CF_9300_0000_FFFF;
const CODE16_SEGMENT: u64 = 0x0000_9B00_0000_FFFF;
const DATA16_SEGMENT: u64 = 0x0000_9300_0000_FFFF;
const CODE16_FLAT_SEGMENT: u64 = 0x008F_9B00_0000_FFFF;
/// An available TSS; 64-bit in long mode, 32-bit outside.
const TSS_AVAILABLE: u64 = 0x0000_8900_0000_0000;

/// A table that starts a cache line, so that no entry of it crosses one.
#[repr(C, align(64))]
pub(crate) struct Table<const ENTRIES: usize>(pub(crate) [AtomicU64; ENTRIES]);

/// The GDT. Its first entries are in place before any Rust code runs: the PVH entry loads it.
pub(crate) static GDT: Table<GDT_ENTRIES> = Table(gdt());

const fn gdt() -> [AtomicU64; GDT_ENTRIES] {
    let mut entries = [const { AtomicU64::new(0) }; GDT_ENTRIES];
    let mut ring = 0;
    while ring <= 3 {
        let privilege = (ring as u64) << 45;
        entries[code(ring) as usize / 8] = AtomicU64::new(CODE64_SEGMENT | privilege);
        entries[data(ring) as usize / 8] = AtomicU64::new(DATA_SEGMENT | privilege);
        ring += 1;
    }
    entries[CODE32 as usize / 8] = AtomicU64::new(CODE32_SEGMENT);
    entries[CODE16 as usize / 8] = AtomicU64::new(CODE16_SEGMENT);
    entries[DATA16 as usize / 8] = AtomicU64::new(DATA16_SEGMENT);
    entries[CODE32_RING3 as usize / 8] = AtomicU64::new(CODE32_SEGMENT | 3 << 45);
    entries[CODE16_FLAT as usize / 8] = AtomicU64::new(CODE16_FLAT_SEGMENT);
    entries
}

/// Operand of LGDT and LIDT.
#[repr(C, packed)]
pub(crate) struct TablePointer {
    limit: u16,
    base: u64,
}

impl TablePointer {
    pub(crate) fn to<const ENTRIES: usize>(table: &'static Table<ENTRIES>) -> Self {
        Self { limit: (size_of::<[u64; ENTRIES]>() - 1) as u16, base: table as *const _ as u64 }
    }
}

/// The 64-bit TSS (SDM volume 3, "Task Management in 64-bit Mode").
#[repr(C, packed)]
struct TaskStateSegment {
    reserved: u32,
    stacks: [u64; 3],
    reserved2: u64,
    interrupt_stacks: [u64; 7],
    reserved3: [u16; 5],
    io_map: u16,
}

const _: () = assert!(size_of::<TaskStateSegment>() == 104);

/// A CPU's TSS.
#[repr(C, align(128))]
pub(crate) struct TaskState(UnsafeCell<TaskStateSegment>);
// SAFETY: written when its CPU starts, by that CPU; after that only the processor itself reads it.
unsafe impl Sync for TaskState {}

impl TaskState {
    pub(crate) const fn new() -> Self {
        Self(UnsafeCell::new(TaskStateSegment {
            reserved: 0,
            stacks: [0; 3],
            reserved2: 0,
            interrupt_stacks: [0; 7],
            reserved3: [0; 5],
            io_map: 0,
        }))
    }
}

/// A stack; the processor and compiled code alike count on the alignment of its top.
#[repr(C, align(16))]
pub(crate) struct Stack<const BYTES: usize>(UnsafeCell<[u8; BYTES]>);
// SAFETY: only its address is taken; the contents belong to whatever runs on it.
unsafe impl<const BYTES: usize> Sync for Stack<BYTES> {}

impl<const BYTES: usize> Stack<BYTES> {
    pub(crate) const fn new() -> Self {
        Self(UnsafeCell::new([0; BYTES]))
    }

    /// The address to start from, downwards.
    pub(crate) fn top(&self) -> u64 {
        self.0.get() as u64 + BYTES as u64
    }
}

/// The GDT entry of a TSS at `base`, its lower half.
pub(crate) fn tss_descriptor(base: u64, bytes: usize) -> u64 {
    TSS_AVAILABLE | (base & 0xFF_FFFF) << 16 | (base >> 24 & 0xFF) << 56 | (bytes as u64 - 1)
}

/// Sets up this CPU's TSS with its stacks and loads it.
pub(crate) fn init(cpu: usize) {
    let area = area::area();
    area.local.cpu.store(cpu as u64, Ordering::Relaxed);
    let mut interrupt_stacks = [0; 7];
    interrupt_stacks[IST_EXCEPTION as usize - 1] = area.exception.top();
    interrupt_stacks[IST_DOUBLE_FAULT as usize - 1] = area.double_fault.top();
    interrupt_stacks[IST_NMI as usize - 1] = area.nmi.top();
    // SAFETY: start-up of this CPU: nothing else has a reference to it.
    unsafe {
        *area.local.task_state.0.get() = TaskStateSegment {
            reserved: 0,
            stacks: [area.exception.top(), 0, 0],
            reserved2: 0,
            interrupt_stacks,
            reserved3: [0; 5],
            io_map: size_of::<TaskStateSegment>() as u16,
        };
    }
    load_tss();
}

/// Loads this CPU's 64-bit TSS into TR, from a fresh descriptor: LTR wants one that is not busy.
pub(crate) fn load_tss() {
    let local = area::local();
    let base = local.task_state.0.get() as u64;
    let entry = match local.cpu.load(Ordering::Relaxed) as usize {
        0 => usize::from(TSS / 8),
        other => OTHER_TSS + 2 * (other - 1),
    };
    GDT.0[entry].store(tss_descriptor(base, size_of::<TaskStateSegment>()), Ordering::Relaxed);
    GDT.0[entry + 1].store(base >> 32, Ordering::Relaxed);
    // SAFETY: the descriptor is that of a TSS which lives for ever.
    unsafe { asm!("ltr {:x}", in(reg) entry * 8, options(nostack, preserves_flags)) };
}
