//! What belongs to one CPU alone, its stacks included: an area that starts at a multiple of its
//! size. All stacks of a CPU lie in its area, so that RSP says which one it is, at any CPL, and no
//! register or segment has to be kept for it.

use core::arch::asm;
use core::mem::offset_of;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::segments::{Stack, TaskState};

/// Most CPUs that a guest uses.
pub const MAX_CPUS: usize = 16;

/// Bytes of an area, a power of two.
pub(crate) const AREA_BYTES: usize = 0x2_0000;
/// What RSP is masked with for the address of the area.
pub(crate) const AREA_MASK: i32 = -(AREA_BYTES as i32);

const _: () = assert!(AREA_BYTES.is_power_of_two() && size_of::<Area>() == AREA_BYTES);
const LOCAL_BYTES: usize = 0x1000;
const _: () = assert!(size_of::<Local>() == LOCAL_BYTES);

/// An area. The linker script aligns it to its size.
#[repr(C, align(4096))]
pub(crate) struct Area {
    pub(crate) local: Local,
    pub(crate) double_fault: Stack<0x2000>,
    pub(crate) nmi: Stack<0x1000>,
    pub(crate) exception: Stack<0x4000>,
    /// The stack of the outer rings.
    pub(crate) outer: Stack<0x4000>,
    main: Stack<{ AREA_BYTES - LOCAL_BYTES - 0xB000 }>,
}

/// A CPU's data.
#[repr(C, align(4096))]
pub(crate) struct Local {
    /// Where a [`probe!`](crate::probe) that runs wants to go on after an exception; 0 when none
    /// runs.
    pub(crate) recovery: AtomicU64,
    /// The last exception that a probe caught: vector plus one (0: none), error, RIP, CPL, address.
    pub(crate) caught: [AtomicU64; 5],
    /// RSP of ring 0 while an outer ring runs.
    pub(crate) home: AtomicU64,
    /// Its number, which is its x2APIC ID.
    pub(crate) cpu: AtomicU64,
    /// What it runs once it is started.
    pub(crate) entry: AtomicU64,
    /// How often it was started.
    pub(crate) starts: AtomicU64,
    /// How it was when it started: base of CS, CR0, CR4, EFER.
    pub(crate) start_state: [AtomicU64; 4],
    /// How many interrupts of each vector arrived.
    pub(crate) arrived: [AtomicU64; 256],
    pub(crate) task_state: TaskState,
}

/// Offsets for assembly.
pub(crate) const HOME: usize = offset_of!(Area, local.home);

impl Area {
    pub(crate) const fn new() -> Self {
        Self {
            local: Local {
                recovery: AtomicU64::new(0),
                caught: [const { AtomicU64::new(0) }; 5],
                home: AtomicU64::new(0),
                cpu: AtomicU64::new(0),
                entry: AtomicU64::new(0),
                starts: AtomicU64::new(0),
                start_state: [const { AtomicU64::new(0) }; 4],
                arrived: [const { AtomicU64::new(0) }; 256],
                task_state: TaskState::new(),
            },
            double_fault: Stack::new(),
            nmi: Stack::new(),
            exception: Stack::new(),
            outer: Stack::new(),
            main: Stack::new(),
        }
    }
}

/// The area of the CPU that the guest starts on.
#[unsafe(link_section = ".bss.area.first")]
pub(crate) static FIRST: Area = Area::new();

/// Those of the others, in order, right behind it. Not in a guest that does not start them.
#[unsafe(link_section = ".bss.area.others")]
pub(crate) static OTHERS: [Area; MAX_CPUS - 1] = [const { Area::new() }; MAX_CPUS - 1];

/// The area of this CPU.
pub(crate) fn area() -> &'static Area {
    let area: usize;
    // SAFETY: only looks at RSP.
    unsafe {
        asm!("mov {area}, rsp", "and {area}, {mask}", area = out(reg) area,
            mask = const AREA_MASK, options(nomem, nostack));
    }
    // SAFETY: RSP points into a stack of an area, which lives for ever; all in it may be shared.
    unsafe { &*(area as *const Area) }
}

/// The data of this CPU.
pub(crate) fn local() -> &'static Local {
    &area().local
}

/// The number of this CPU.
pub(crate) fn this_cpu() -> usize {
    local().cpu.load(Ordering::Relaxed) as usize
}

/// The area of a CPU.
pub(crate) fn area_of(cpu: usize) -> &'static Area {
    match cpu.checked_sub(1) {
        None => &FIRST,
        Some(index) => &OTHERS[index],
    }
}
