//! Segments: a code and a data segment for each ring, 32-bit and 16-bit ones for the way out of
//! long mode, the TSS.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::mem::size_of;
use core::sync::atomic::{AtomicU64, Ordering};

/// Selector of ring `ring`'s 64-bit code segment, its RPL included.
pub const fn code(ring: u16) -> u16 {
    (0x08 + 0x10 * ring) | ring
}

/// Selector of ring `ring`'s data segment, its RPL included.
pub const fn data(ring: u16) -> u16 {
    (0x10 + 0x10 * ring) | ring
}

/// Selector of the 32-bit code segment of ring 0.
pub(crate) const CODE32: u16 = 0x48;
/// Selector of the 16-bit code segment: base 0, limit 64 KiB, as real mode needs it.
pub(crate) const CODE16: u16 = 0x50;
/// Selector of the 16-bit data segment: base 0, limit 64 KiB.
pub(crate) const DATA16: u16 = 0x58;
/// Selector of the 64-bit TSS, which takes two entries.
pub(crate) const TSS: u16 = 0x60;
/// Selector of the 32-bit TSS that virtual-8086 mode needs.
pub(crate) const TSS32: u16 = 0x70;

/// Index of the IST stack of every exception but #DF.
pub(crate) const IST_EXCEPTION: u64 = 1;
/// Index of the IST stack of #DF.
pub(crate) const IST_DOUBLE_FAULT: u64 = 2;

// Flat segments, present and with the accessed bit already set: the processor sets that bit by a
// locked access of its own.
const CODE64_SEGMENT: u64 = 0x00AF_9B00_0000_FFFF;
const CODE32_SEGMENT: u64 = 0x00CF_9B00_0000_FFFF;
const DATA_SEGMENT: u64 = 0x00CF_9300_0000_FFFF;
const CODE16_SEGMENT: u64 = 0x0000_9B00_0000_FFFF;
const DATA16_SEGMENT: u64 = 0x0000_9300_0000_FFFF;
/// An available TSS; 64-bit in long mode, 32-bit outside.
const TSS_AVAILABLE: u64 = 0x0000_8900_0000_0000;

const fn privilege(ring: u64) -> u64 {
    ring << 45
}

/// A table that starts a cache line, so that no entry of it crosses one.
#[repr(C, align(64))]
pub(crate) struct Table<const ENTRIES: usize>(pub(crate) [AtomicU64; ENTRIES]);

/// The GDT. Its first entries are in place before any Rust code runs: the PVH entry loads it.
pub(crate) static GDT: Table<15> = Table([
    AtomicU64::new(0),
    AtomicU64::new(CODE64_SEGMENT),
    AtomicU64::new(DATA_SEGMENT),
    AtomicU64::new(CODE64_SEGMENT | privilege(1)),
    AtomicU64::new(DATA_SEGMENT | privilege(1)),
    AtomicU64::new(CODE64_SEGMENT | privilege(2)),
    AtomicU64::new(DATA_SEGMENT | privilege(2)),
    AtomicU64::new(CODE64_SEGMENT | privilege(3)),
    AtomicU64::new(DATA_SEGMENT | privilege(3)),
    AtomicU64::new(CODE32_SEGMENT),
    AtomicU64::new(CODE16_SEGMENT),
    AtomicU64::new(DATA16_SEGMENT),
    AtomicU64::new(0),
    AtomicU64::new(0),
    AtomicU64::new(0),
]);

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
struct TaskState {
    reserved: u32,
    stacks: [u64; 3],
    reserved2: u64,
    interrupt_stacks: [u64; 7],
    reserved3: [u16; 5],
    io_map: u16,
}

const _: () = assert!(size_of::<TaskState>() == 104);

struct TaskStateCell(UnsafeCell<TaskState>);
// SAFETY: written once at start, by the only processor; after that only the processor itself reads
// it.
unsafe impl Sync for TaskStateCell {}

static TASK_STATE: TaskStateCell = TaskStateCell(UnsafeCell::new(TaskState {
    reserved: 0,
    stacks: [0; 3],
    reserved2: 0,
    interrupt_stacks: [0; 7],
    reserved3: [0; 5],
    io_map: size_of::<TaskState>() as u16,
}));

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

static EXCEPTION_STACK: Stack<0x4000> = Stack::new();
static DOUBLE_FAULT_STACK: Stack<0x2000> = Stack::new();

/// The GDT entry of a TSS at `base`, its lower half.
pub(crate) fn tss_descriptor(base: u64, bytes: usize) -> u64 {
    TSS_AVAILABLE | (base & 0xFF_FFFF) << 16 | (base >> 24 & 0xFF) << 56 | (bytes as u64 - 1)
}

/// Sets up the TSS with its stacks and loads it.
pub(crate) fn init() {
    let state = TASK_STATE.0.get();
    // SAFETY: start-up: nothing else has a reference to it.
    unsafe {
        (*state).stacks[0] = EXCEPTION_STACK.top();
        (*state).interrupt_stacks[IST_EXCEPTION as usize - 1] = EXCEPTION_STACK.top();
        (*state).interrupt_stacks[IST_DOUBLE_FAULT as usize - 1] = DOUBLE_FAULT_STACK.top();
    }
    load_tss();
}

/// Loads the 64-bit TSS into TR, from a fresh descriptor: LTR wants one that is not busy.
pub(crate) fn load_tss() {
    let base = TASK_STATE.0.get() as u64;
    let entry = usize::from(TSS / 8);
    GDT.0[entry].store(tss_descriptor(base, size_of::<TaskState>()), Ordering::Relaxed);
    GDT.0[entry + 1].store(base >> 32, Ordering::Relaxed);
    // SAFETY: the descriptor is that of a TSS which lives for ever.
    unsafe { asm!("ltr {:x}", in(reg) TSS, options(nostack, preserves_flags)) };
}
