//! GDT, TSS, and the stacks that exceptions run on.

use alloc::boxed::Box;

use x86_64::instructions::segmentation::{CS, DS, ES, FS, GS, SS, Segment};
use x86_64::instructions::tables::load_tss;
use x86_64::registers::segmentation::SegmentSelector;
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable};
use x86_64::structures::tss::TaskStateSegment;

use super::stack;

/// IST slots. Every handler has a stack of its own, because the precompiled `core` library uses
/// the red zone below the interrupted stack pointer.
pub mod ist {
    /// Exceptions that are not listed below, and interrupts.
    pub const EXCEPTION: u16 = 0;
    /// NMI.
    pub const NMI: u16 = 1;
    /// #DF.
    pub const DOUBLE_FAULT: u16 = 2;
    /// #MC.
    pub const MACHINE_CHECK: u16 = 3;
    /// How many there are.
    pub const COUNT: usize = 4;
}

/// Size of an exception stack. A handler may format a message.
const STACK_BYTES: u64 = 16 * 1024;

/// The tables of one CPU, which live as long as it runs.
pub struct Segments {
    /// Linear address of the GDT.
    pub gdt_base: u64,
    /// Linear address of the TSS.
    pub tss_base: u64,
    /// CS selector.
    pub cs: SegmentSelector,
    /// SS, DS, ES selector.
    pub ss: SegmentSelector,
    /// TR selector.
    pub tr: SegmentSelector,
}

impl Segments {
    /// Makes the tables and loads them on this CPU; `None` without memory.
    pub fn load() -> Option<Self> {
        let mut tss = TaskStateSegment::new();
        for slot in 0..ist::COUNT {
            tss.interrupt_stack_table[slot] = stack::allocate(STACK_BYTES)?;
        }
        let tss: &'static TaskStateSegment = Box::leak(Box::new(tss));
        let mut gdt = GlobalDescriptorTable::new();
        let cs = gdt.append(Descriptor::kernel_code_segment());
        let ss = gdt.append(Descriptor::kernel_data_segment());
        let tr = gdt.append(Descriptor::tss_segment(tss));
        let gdt: &'static GlobalDescriptorTable = Box::leak(Box::new(gdt));
        gdt.load();
        // SAFETY: the selectors are of the table just loaded, flat code and data at ring 0; the
        // TSS lives for ever.
        unsafe {
            CS::set_reg(cs);
            SS::set_reg(ss);
            DS::set_reg(ss);
            ES::set_reg(ss);
            FS::set_reg(SegmentSelector::NULL);
            GS::set_reg(SegmentSelector::NULL);
            load_tss(tr);
        }
        Some(Self {
            gdt_base: gdt.entries().as_ptr() as u64,
            tss_base: &raw const *tss as u64,
            cs,
            ss,
            tr,
        })
    }
}
