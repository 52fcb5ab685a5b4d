//! Puts a kernel into place and describes the machine to it, as its configuration asks.

use core::{
    mem::{offset_of, transmute},
    slice,
};

use arrayvec::ArrayVec;
use bootloader_api::{
    BootInfo,
    config::Mapping,
    info::{FrameBuffer, FrameBufferInfo, MemoryRegion, MemoryRegions, Optional, TlsTemplate},
};
use x86_64::{PhysAddr, VirtAddr};

use crate::{
    Error, PAGE,
    frames::Frames,
    handover::{self, Handover},
    kernel::{Kernel, MAX_SEGMENTS},
    memory_map::MemoryMap,
    paging::{Access, Tables},
    physical::{Memory, bytes_of},
    space::{Request, Space},
};

/// At least this much physical memory is mapped if any is: up to here there are devices.
const FOUR_GIB: u64 = 1 << 32;

/// The part of the address space that one entry of the highest page table stands for.
const ROOT_ENTRY: u64 = 1 << 39;

/// A framebuffer.
#[derive(Clone, Copy, Debug)]
pub struct Framebuffer {
    /// Its physical address.
    pub start: PhysAddr,
    /// Its size and format.
    pub info: FrameBufferInfo,
}

/// What the firmware stage found and read.
pub struct Machine<'a> {
    /// The kernel's ELF file.
    pub kernel: &'a [u8],
    /// Where that file lies in physical memory.
    pub kernel_at: PhysAddr,
    /// Physical address (page-aligned) and size in bytes of the ramdisk.
    pub ramdisk: Option<(PhysAddr, u64)>,
    /// Physical address of the ACPI root pointer.
    pub rsdp: Option<PhysAddr>,
    /// Where the screen is, in a graphics mode.
    pub framebuffer: Option<Framebuffer>,
    /// What the firmware says about physical memory.
    pub map: &'a MemoryMap,
    /// How many bits a physical address has (CPUID 80000008h).
    pub physical_bits: u32,
    /// Whether there are pages of 1 GiB (CPUID 80000001h).
    pub gib_pages: bool,
    /// Whether the CPU runs with five-level paging (CR4.LA57), which cannot be left in 64-bit mode.
    pub five_level: bool,
}

/// Places the kernel and all that goes with it into memory from `frames`, which must not give out
/// the kernel's file or the ramdisk, and makes the boot information and the page tables. Nothing is
/// mapped both writable and executable.
pub fn load<M: Memory>(
    machine: &Machine<'_>,
    memory: &mut M,
    mut frames: Frames,
) -> Result<Handover, Error> {
    let kernel = Kernel::parse(machine.kernel)?;
    let mappings = &kernel.config.mappings;
    if mappings.aslr {
        return Err(Error::Unsupported("random addresses (aslr)"));
    }
    if kernel.config.kernel_stack_size == 0 {
        return Err(Error::BadConfig("the kernel stack has no size"));
    }
    // Far more than there is memory, far less than would overflow a sum.
    let stack_size = kernel.config.kernel_stack_size.min(1 << 48).next_multiple_of(PAGE);
    let (ramdisk_at, ramdisk_len) = machine.ramdisk.unwrap_or((PhysAddr::zero(), 0));
    let all_memory = machine.map.end().max(FOUR_GIB).min(1 << machine.physical_bits.min(52));
    // From the start of its first page.
    let (framebuffer_first, framebuffer_bytes) =
        machine.framebuffer.map_or((0, 0), |framebuffer| {
            let first = framebuffer.start.align_down(PAGE).as_u64();
            let offset = framebuffer.start.as_u64() - first;
            (first, (offset + framebuffer.info.byte_len as u64).next_multiple_of(PAGE))
        });
    let regions_offset = size_of::<BootInfo>().next_multiple_of(align_of::<MemoryRegion>());
    let info_size = (regions_offset + frames.max_regions() * size_of::<MemoryRegion>()) as u64;

    // 1. Addresses for everything.
    let mut space = Space::new(mappings);
    let (first, span) = kernel.span();
    let image_size = if kernel.position_independent {
        span
    } else {
        if mappings.kernel_base != Mapping::Dynamic {
            return Err(Error::Unsupported("a base address without being position-independent"));
        }
        for segment in &kernel.segments {
            space.claim("a segment of the kernel", segment.first_page(), segment.page_bytes())?;
        }
        0
    };
    let request =
        |what, mapping, bytes| Request { what, mapping, bytes, align: PAGE, fixed_align: PAGE };
    let optional = |mapping: Option<Mapping>, bytes| match mapping {
        Some(mapping) => (mapping, bytes),
        None => (Mapping::Dynamic, 0),
    };
    let (physical_mapping, physical_size) = optional(mappings.physical_memory, all_memory);
    let (recursive_mapping, recursive_size) = optional(mappings.page_table_recursive, ROOT_ENTRY);
    let requests = [
        request("the kernel", mappings.kernel_base, image_size),
        request("the kernel stack", mappings.kernel_stack, PAGE + stack_size),
        request("the ramdisk", mappings.ramdisk_memory, ramdisk_len.next_multiple_of(PAGE)),
        // Aligned so that the largest pages can be used.
        Request {
            align: 1 << 30,
            ..request("the physical memory", physical_mapping, physical_size.next_multiple_of(PAGE))
        },
        Request {
            align: ROOT_ENTRY,
            fixed_align: ROOT_ENTRY,
            ..request("the recursive page table", recursive_mapping, recursive_size)
        },
        request("the boot information", mappings.boot_info, info_size.next_multiple_of(PAGE)),
        request("the framebuffer", mappings.framebuffer, framebuffer_bytes),
    ];
    let fixed = space.place_fixed(&requests)?;
    // The handover page can be any whose own address is free.
    let page = loop {
        let page = frames.allocate(PAGE, "the handover page")?;
        if space.claim("the handover page", page.as_u64(), PAGE).is_ok() {
            break page;
        }
    };
    let [image_at, stack_at, ramdisk_virt, physical_at, recursive_at, info_at, framebuffer_at] =
        space.place_others(&requests, fixed)?;
    let bias = if kernel.position_independent { image_at.wrapping_sub(first) } else { 0 };

    // 2. The kernel's segments.
    let mut tables = Tables::new(memory, &mut frames)?;
    let small_pages = |_, _| false;
    let mut segments_at = ArrayVec::<PhysAddr, MAX_SEGMENTS>::new();
    for segment in &kernel.segments {
        let what = "a segment of the kernel";
        let (first, last) = (segment.first_page(), segment.last_page());
        let at = tables.frames.allocate(segment.page_bytes(), what)?;
        tables.memory.zero(at, segment.page_bytes());
        let start = at + (segment.address - first);
        tables.memory.write(start, bytes_of(segment.data));
        for page in (first..=last).step_by(PAGE as usize) {
            let protected = kernel.relro.contains(&page);
            let access = match segment.access {
                Access::ReadWrite if protected => Access::ReadOnly,
                access => access,
            };
            let virt = bias.wrapping_add(page);
            tables.map(what, virt, at + (page - first), PAGE, access, small_pages)?;
        }
        segments_at.push(start);
    }
    for word in kernel.relocated(bias) {
        let (index, offset, value) = word?;
        tables.memory.write(segments_at[index] + offset, bytes_of(&value.to_le_bytes()));
    }

    // 3. The stack, above a page that stays unmapped.
    let stack = tables.frames.allocate(stack_size, "the kernel stack")?;
    tables.memory.zero(stack, stack_size);
    let stack_bottom = stack_at + PAGE;
    tables.map(
        "the kernel stack",
        stack_bottom,
        stack,
        stack_size,
        Access::ReadWrite,
        small_pages,
    )?;

    // 4. What is there already.
    let any_pages = |_, _| true;
    tables.map(
        "the ramdisk",
        ramdisk_virt,
        ramdisk_at,
        ramdisk_len,
        Access::ReadWrite,
        any_pages,
    )?;
    // Large pages only where all the memory in one is of one kind, as it must have one memory type
    // (Intel SDM volume 3, "Memory Cache Control", "Large Page Size Considerations").
    let uniform = |start, size| {
        (size < 1 << 30 || machine.gib_pages) && machine.map.is_uniform(start, start + size)
    };
    let zero = PhysAddr::zero();
    let what = "the physical memory";
    tables.map(what, physical_at, zero, physical_size, Access::ReadWrite, uniform)?;
    if recursive_size > 0 {
        if machine.five_level {
            return Err(Error::Unsupported("a recursive page table under five-level paging"));
        }
        tables.map_recursively(recursive_at)?;
    }
    tables.map(
        "the framebuffer",
        framebuffer_at,
        PhysAddr::new(framebuffer_first),
        framebuffer_bytes,
        Access::Framebuffer,
        |_, size| size < 1 << 30 || machine.gib_pages,
    )?;

    // 5. The handover page.
    let what = "the handover page";
    tables.map(what, page.as_u64(), page, PAGE, Access::Execute, small_pages)?;
    tables.memory.zero(page, PAGE);
    tables.memory.write(page, bytes_of(handover::code()));

    // 6. The boot information, last: the memory map tells of all that was taken.
    let info_phys = tables.frames.allocate(info_size, "the boot information")?;
    tables.memory.zero(info_phys, info_size.next_multiple_of(PAGE));
    let what = "the boot information";
    tables.map(what, info_at, info_phys, info_size, Access::ReadWrite, small_pages)?;
    let root = if machine.five_level { tables.fifth_level()? } else { tables.root() };

    let regions_at = info_at + regions_offset as u64;
    let mut count = 0;
    for region in frames.regions() {
        let offset = regions_offset + count * size_of::<MemoryRegion>();
        memory.write(info_phys + offset as u64, bytes_of(slice::from_ref(&region)));
        count += 1;
    }
    let mut info = BootInfo::new(memory_regions(regions_at, count));
    info.physical_memory_offset = mappings.physical_memory.map(|_| physical_at).into();
    info.recursive_index =
        mappings.page_table_recursive.map(|_| VirtAddr::new(recursive_at).p4_index().into()).into();
    info.framebuffer = machine
        .framebuffer
        .map(|Framebuffer { start, info }| {
            let start = framebuffer_at + (start.as_u64() - framebuffer_first);
            // SAFETY: the kernel's tables map the framebuffer there; nobody here goes through it.
            unsafe { FrameBuffer::new(start, info) }
        })
        .into();
    info.rsdp_addr = machine.rsdp.map(PhysAddr::as_u64).into();
    info.tls_template = kernel
        .tls
        .map(|tls| TlsTemplate { start_addr: bias.wrapping_add(tls.start_addr), ..tls })
        .into();
    if machine.ramdisk.is_some() {
        info.ramdisk_addr = Optional::Some(ramdisk_virt);
        info.ramdisk_len = ramdisk_len;
    }
    info.kernel_addr = machine.kernel_at.as_u64();
    info.kernel_len = machine.kernel.len() as u64;
    info.kernel_image_offset = bias;
    info.kernel_stack_bottom = stack_bottom;
    info.kernel_stack_len = stack_size;
    memory.write(info_phys, bytes_of(slice::from_ref(&info)));

    Ok(Handover {
        root,
        page,
        stack_top: VirtAddr::new(stack_bottom + stack_size),
        entry: VirtAddr::new(bias.wrapping_add(kernel.entry)),
        boot_info: VirtAddr::new(info_at),
    })
}

/// A list of `count` regions at `address` in the kernel's address space, where the loader cannot
/// refer to it.
fn memory_regions(address: u64, count: usize) -> MemoryRegions {
    #[repr(C)]
    struct Raw {
        ptr: u64,
        len: usize,
    }
    const _: () = assert!(size_of::<Raw>() == size_of::<MemoryRegions>());
    const _: () = assert!(offset_of!(Raw, len) == 8);
    // SAFETY: `MemoryRegions` is `repr(C)`, made of a pointer and a length. Any bits are a valid
    // raw pointer, and nothing here dereferences it.
    unsafe { transmute(Raw { ptr: address, len: count }) }
}

#[cfg(test)]
mod tests {
    use std::mem::MaybeUninit;

    use bootloader_api::{
        BootloaderConfig,
        info::{MemoryRegionKind, PixelFormat},
    };

    use super::*;
    use crate::{
        kernel::tests::{BASE, DYNAMIC, Elf, R, RELRO, TLS},
        memory_map::E820Entry,
        paging::tests::{Page, walk},
        physical::recording::Recording,
    };

    const KERNEL_AT: u64 = 0x10_0000;
    const RAMDISK_AT: u64 = 0x20_0000;
    const RAMDISK_LEN: u64 = 5000;
    const RSDP: u64 = 0xf_0010;

    /// A machine with 64 MiB after which a kernel was started.
    struct Started {
        memory: Recording,
        handover: Handover,
        info: BootInfo,
        regions: Vec<MemoryRegion>,
        pages: Vec<Page>,
        file: Vec<u8>,
    }

    /// What tests change about the machine.
    #[derive(Clone, Copy)]
    struct Setup {
        /// Memory above 1 MiB.
        bytes: u64,
        has_ramdisk: bool,
        /// The end of what the firmware knows of.
        end: u64,
        gib_pages: bool,
        framebuffer: Option<Framebuffer>,
        five_level: bool,
    }

    const SETUP: Setup = Setup {
        bytes: 64 << 20,
        has_ramdisk: true,
        end: 1 << 32,
        gib_pages: false,
        framebuffer: None,
        five_level: false,
    };

    fn start(elf: &Elf) -> Result<Started, Error> {
        start_with(elf, SETUP)
    }

    fn start_with(elf: &Elf, setup: Setup) -> Result<Started, Error> {
        let Setup { bytes, has_ramdisk, end, gib_pages, framebuffer, five_level } = setup;
        let reported = [
            (0, 0x9_f000, 1),
            (0xf_0000, 0x1_0000, 2),
            (0x10_0000, bytes, 1),
            (0xfffc_0000, end - 0xfffc_0000, 2),
        ]
        .map(|(start, len, kind)| E820Entry { start, len, kind }.into());
        let map = MemoryMap::new(&reported).unwrap();
        let mut frames = Frames::new(&map, PhysAddr::new(0x10_0000), PhysAddr::new(1 << 32));
        assert_eq!(frames.allocate(0x10_0000, "kernel file").unwrap().as_u64(), KERNEL_AT);
        assert_eq!(frames.allocate(RAMDISK_LEN, "ramdisk").unwrap().as_u64(), RAMDISK_AT);
        let file = elf.bytes();
        let machine = Machine {
            kernel: &file,
            kernel_at: PhysAddr::new(KERNEL_AT),
            ramdisk: has_ramdisk.then_some((PhysAddr::new(RAMDISK_AT), RAMDISK_LEN)),
            rsdp: Some(PhysAddr::new(RSDP)),
            map: &map,
            framebuffer,
            physical_bits: 40,
            gib_pages,
            five_level,
        };
        let mut memory = Recording::default();
        let mut handover = load(&machine, &mut memory, frames)?;
        if five_level {
            // Both halves of the canonical addresses lead to one and the same table.
            let entry = |index: u64| memory.read_entry(handover.root + 8 * index);
            assert_eq!(entry(0), entry(511));
            assert!((1..511).all(|index| entry(index) == 0));
            handover.root = PhysAddr::new(entry(0) & 0x000f_ffff_ffff_f000);
        }
        let recursive = elf_config(elf).mappings.page_table_recursive.is_some();
        // The recursive slot, found without the loader: the entry that points to the root.
        let slot = (0..512).find(|i| {
            let entry = memory.read_entry(handover.root + 8 * *i);
            entry & 0x000f_ffff_ffff_f000 == handover.root.as_u64()
        });
        assert_eq!(slot.is_some(), recursive);
        let pages = walk(&memory, handover.root, slot);
        let at = physical(&pages, handover.boot_info.as_u64()).unwrap();
        let info: BootInfo = typed(&memory, at);
        let (list, count): (u64, usize) = {
            // SAFETY: both are a pointer and a length.
            unsafe { transmute(info.memory_regions) }
        };
        let size = size_of::<MemoryRegion>();
        let regions = (0..count)
            .map(|i| typed(&memory, physical(&pages, list + (i * size) as u64).unwrap()))
            .collect();
        let info: BootInfo = typed(&memory, at);
        Ok(Started { memory, handover, info, regions, pages, file })
    }

    fn elf_config(elf: &Elf) -> BootloaderConfig {
        BootloaderConfig::deserialize(&elf.config).unwrap()
    }

    fn typed<T>(memory: &Recording, at: u64) -> T {
        let bytes = memory.read(at, size_of::<T>());
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: `load` wrote a `T` there, whose bytes are copied as they are.
        unsafe {
            value.as_mut_ptr().cast::<MaybeUninit<u8>>().copy_from(bytes.as_ptr(), bytes.len());
            value.assume_init()
        }
    }

    fn page(pages: &[Page], virt: u64) -> Option<Page> {
        pages.iter().copied().find(|p| p.virt <= virt && virt - p.virt < p.size)
    }

    fn physical(pages: &[Page], virt: u64) -> Option<u64> {
        page(pages, virt).map(|p| p.phys + (virt - p.virt))
    }

    fn configured(change: impl Fn(&mut BootloaderConfig)) -> Elf {
        let mut config = BootloaderConfig::new_default();
        change(&mut config);
        Elf { config: config.serialize().to_vec(), ..Elf::sound() }
    }

    /// What must hold whatever the kernel asks for.
    fn check(started: &Started) {
        let Started { pages, regions, info, handover, .. } = started;
        assert!(pages.iter().all(|p| !(p.writable && p.executable)));
        assert!(regions.windows(2).all(|r| r[0].end <= r[1].start));
        // All that is mapped for the kernel or needed to map it is taken from the map.
        let taken = |address: u64| {
            let region = regions.iter().find(|r| r.start <= address && address < r.end);
            region.is_some_and(|r| r.kind == MemoryRegionKind::Bootloader)
        };
        let offset = info.physical_memory_offset.into_option();
        let physical_range = |virt| offset.is_some_and(|o| virt >= o && virt - o < 1 << 40);
        let device = |p: &Page| p.write_through;
        assert!(pages.iter().all(|p| physical_range(p.virt) || device(p) || taken(p.phys)));
        assert!(started.memory.entries.iter().all(|(at, _)| taken(*at)));
        assert!(taken(KERNEL_AT) && taken(RAMDISK_AT) && taken(handover.page.as_u64()));
        // The stack: all of it, and nothing below.
        let (bottom, len) = (info.kernel_stack_bottom, info.kernel_stack_len);
        assert!((bottom..bottom + len).step_by(4096).all(|a| page(pages, a).unwrap().writable));
        assert_eq!(page(pages, bottom - 1), None);
        assert_eq!(handover.stack_top.as_u64(), bottom + len);
        // The page that changes the page tables.
        let handover_page = page(pages, handover.page.as_u64()).unwrap();
        assert_eq!(handover_page.phys, handover.page.as_u64());
        assert!(handover_page.executable);
        let code = started.memory.bytes(handover.page.as_u64(), handover::code().len());
        assert_eq!(code, handover::code());
    }

    #[test]
    fn a_kernel_with_the_default_configuration() {
        let started = start(&Elf::sound()).unwrap();
        check(&started);
        let Started { memory, handover, info, pages, file, .. } = &started;
        assert_eq!(handover.entry.as_u64(), BASE + 0x2010);
        let rights = |virt| page(pages, virt).map(|p| (p.writable, p.executable));
        assert_eq!(rights(BASE), Some((false, false)));
        assert_eq!(rights(BASE + 0x1fff), Some((false, false)));
        assert_eq!(rights(BASE + 0x2000), Some((false, true)));
        assert_eq!(rights(BASE + 0x3000), Some((true, false)));
        assert_eq!(rights(BASE + 0x5fff), Some((true, false)));
        assert_eq!(rights(BASE + 0x6000), None);
        let bytes = |virt, len| memory.bytes(physical(pages, virt).unwrap(), len);
        assert_eq!(bytes(BASE, 0x1000), [0x11; 0x1000]);
        assert_eq!(bytes(BASE + 0x1000, 0x1000)[..0x800], [0x11; 0x800]);
        assert_eq!(bytes(BASE + 0x1800, 0x800), [0; 0x800]);
        assert_eq!(bytes(BASE + 0x3000, 0xf00), [0; 0xf00]);
        assert_eq!(bytes(BASE + 0x3f00, 0x100), [0x33; 0x100]);
        assert_eq!(bytes(BASE + 0x4000, 0x100), [0x33; 0x100]);
        assert_eq!(bytes(BASE + 0x4100, 0xf00), [0; 0xf00]);
        assert_eq!(bytes(BASE + 0x5000, 0x1000), [0; 0x1000]);

        assert_eq!(info.api_version, BootInfo::new(memory_regions(0, 0)).api_version);
        assert_eq!(info.kernel_stack_len, 80 * 1024);
        assert_eq!((info.kernel_addr, info.kernel_len), (KERNEL_AT, file.len() as u64));
        assert_eq!(info.kernel_image_offset, 0);
        assert_eq!(info.rsdp_addr, Optional::Some(RSDP));
        assert_eq!(info.physical_memory_offset, Optional::None);
        assert_eq!(info.recursive_index, Optional::None);
        assert_eq!(info.tls_template, Optional::None);
        assert!(info.framebuffer.as_ref().is_none());
        assert_eq!(info.ramdisk_len, RAMDISK_LEN);
        let ramdisk = info.ramdisk_addr.into_option().unwrap();
        assert_eq!(physical(pages, ramdisk), Some(RAMDISK_AT));
        assert_eq!(physical(pages, ramdisk + 0x1000), Some(RAMDISK_AT + 0x1000));
        assert!(!page(pages, ramdisk).unwrap().executable);
    }

    #[test]
    fn the_memory_map_keeps_what_the_firmware_said() {
        let started = start(&Elf::sound()).unwrap();
        let kinds: Vec<_> = started.regions.iter().map(|r| (r.start, r.kind)).collect();
        use MemoryRegionKind::{Bootloader, UnknownBios, Usable};
        assert_eq!(kinds[..3], [(0, Usable), (0xf_0000, UnknownBios(2)), (0x10_0000, Bootloader)]);
        assert_eq!(kinds[3].1, Usable);
        assert_eq!(started.regions[3].end, 65 << 20);
        assert_eq!(kinds[4], (0xfffc_0000, UnknownBios(2)));
        assert_eq!(kinds.len(), 5);
    }

    #[test]
    fn a_framebuffer_need_not_begin_on_a_page() {
        let info = FrameBufferInfo {
            byte_len: 0x30_0000,
            width: 1024,
            height: 768,
            pixel_format: PixelFormat::Bgr,
            bytes_per_pixel: 4,
            stride: 1024,
        };
        let start = PhysAddr::new(0x20_c000_0100);
        let setup = Setup { framebuffer: Some(Framebuffer { start, info }), ..SETUP };
        let started = start_with(&Elf::sound(), setup).unwrap();
        check(&started);
        let found = started.info.framebuffer.as_ref().unwrap();
        assert_eq!((found.info().width, found.info().byte_len), (1024, 0x30_0000));
        let at = found.buffer().as_ptr() as u64;
        assert_eq!(physical(&started.pages, at), Some(start.as_u64()));
        assert_eq!(physical(&started.pages, at + 0x2f_ffff), Some(start.as_u64() + 0x2f_ffff));
        let page = page(&started.pages, at).unwrap();
        assert!(page.writable && page.write_through);
        let all = started.pages.iter().filter(|page| page.write_through);
        assert_eq!(all.map(|page| page.size).sum::<u64>(), 0x30_1000);
    }

    #[test]
    fn five_level_paging_has_one_table_more() {
        let setup = Setup { five_level: true, ..SETUP };
        check(&start_with(&Elf::sound(), setup).unwrap());
        let elf = configured(|c| c.mappings.page_table_recursive = Some(Mapping::Dynamic));
        assert!(matches!(start_with(&elf, setup), Err(Error::Unsupported(_))));
    }

    #[test]
    fn no_ramdisk() {
        let started = start_with(&Elf::sound(), Setup { has_ramdisk: false, ..SETUP }).unwrap();
        check(&started);
        assert_eq!(started.info.ramdisk_addr, Optional::None);
        assert_eq!(started.info.ramdisk_len, 0);
    }

    #[test]
    fn everything_where_the_kernel_wants_it() {
        let high = 0xffff_9000_0000_0000;
        let started = start(&configured(|c| {
            c.kernel_stack_size = 0x4001;
            c.mappings.kernel_stack = Mapping::FixedAddress(high);
            c.mappings.boot_info = Mapping::FixedAddress(high + 0x10_0000);
            c.mappings.ramdisk_memory = Mapping::FixedAddress(high + 0x20_0000);
            c.mappings.physical_memory = Some(Mapping::FixedAddress(0xffff_8000_0000_0000));
            c.mappings.page_table_recursive = Some(Mapping::FixedAddress(0xffff_ff00_0000_0000));
        }))
        .unwrap();
        check(&started);
        let info = &started.info;
        // The first page is the guard.
        assert_eq!((info.kernel_stack_bottom, info.kernel_stack_len), (high + 0x1000, 0x5000));
        assert_eq!(started.handover.boot_info.as_u64(), high + 0x10_0000);
        assert_eq!(info.ramdisk_addr, Optional::Some(high + 0x20_0000));
        assert_eq!(info.physical_memory_offset, Optional::Some(0xffff_8000_0000_0000));
        assert_eq!(info.recursive_index, Optional::Some(510));
    }

    #[test]
    fn everything_in_the_dynamic_range() {
        let started = start(&configured(|c| {
            c.mappings.dynamic_range_start = Some(0x1234_5678_9000);
            c.mappings.dynamic_range_end = Some(0x7fff_ffff_ffff);
            c.mappings.physical_memory = Some(Mapping::Dynamic);
            c.mappings.page_table_recursive = Some(Mapping::Dynamic);
        }))
        .unwrap();
        check(&started);
        let info = &started.info;
        let recursive = u64::from(info.recursive_index.into_option().unwrap()) << 39;
        for at in [
            info.kernel_stack_bottom,
            started.handover.boot_info.as_u64(),
            info.ramdisk_addr.into_option().unwrap(),
            info.physical_memory_offset.into_option().unwrap(),
            recursive,
        ] {
            assert!((0x1234_5678_9000..0x8000_0000_0000).contains(&at), "{at:#x}");
        }
    }

    #[test]
    fn physical_memory_up_to_4_gib_in_pages_that_respect_the_map() {
        let offset = 0xffff_8000_0000_0000;
        let started = start(&configured(|c| {
            c.mappings.physical_memory = Some(Mapping::FixedAddress(offset));
        }))
        .unwrap();
        check(&started);
        let mut next = 0;
        for page in started.pages.iter().filter(|p| p.virt >= offset && p.virt < BASE) {
            assert_eq!((page.virt, page.phys), (offset + next, next));
            assert!(page.writable);
            let uniform = |bound: u64| bound <= next || next + page.size <= bound;
            assert!(
                [0x9_f000, 0xf_0000, 0x10_0000, 65 << 20, 0xfffc_0000].into_iter().all(uniform)
            );
            next += page.size;
        }
        assert_eq!(next, 1 << 32);
    }

    #[test]
    fn physical_memory_up_to_what_the_cpu_can_address() {
        let elf = configured(|c| c.mappings.physical_memory = Some(Mapping::Dynamic));
        for (end, expected) in [(3 << 38, 3 << 38), (1 << 41, 1 << 40)] {
            let started = start_with(&elf, Setup { end, gib_pages: true, ..SETUP }).unwrap();
            check(&started);
            let last = started.pages.iter().map(|p| p.phys + p.size).max();
            assert_eq!(last, Some(expected));
            assert!(started.pages.iter().any(|p| p.size == 1 << 30));
        }
    }

    #[test]
    fn position_independent_kernels_are_relocated() {
        let mut config = BootloaderConfig::new_default();
        config.mappings.kernel_base = Mapping::FixedAddress(0xffff_a000_0000_0000);
        let fixed = Elf { config: config.serialize().to_vec(), ..Elf::relocatable() };
        for (elf, base) in [(Elf::relocatable(), None), (fixed, Some(0xffff_a000_0000_0000))] {
            let started = start(&elf).unwrap();
            check(&started);
            let bias = started.info.kernel_image_offset;
            assert!(base.is_none_or(|base| base == bias));
            assert_eq!(started.handover.entry.as_u64(), bias + 0x2010);
            let word = physical(&started.pages, bias + 0x4000).unwrap();
            let value = started.memory.bytes(word, 8);
            assert_eq!(value, (bias + 0x2010).to_le_bytes());
        }
    }

    #[test]
    fn relocated_pages_and_thread_local_storage() {
        let mut elf = Elf::sound();
        // Up to the end of the second of three pages.
        elf.programs.push((RELRO, R, BASE + 0x3f00, vec![], 0x1100));
        elf.programs.push((TLS, R, BASE + 0x3f00, vec![0; 8], 24));
        let started = start(&elf).unwrap();
        check(&started);
        let writable = |virt| page(&started.pages, virt).unwrap().writable;
        assert!(!writable(BASE + 0x3f00) && !writable(BASE + 0x4fff) && writable(BASE + 0x5000));
        let template = TlsTemplate { start_addr: BASE + 0x3f00, file_size: 8, mem_size: 24 };
        assert_eq!(started.info.tls_template, Optional::Some(template));
    }

    #[test]
    fn a_kernel_linked_where_the_handover_page_would_be() {
        // The loader's next free frames have the addresses that this kernel is linked to.
        let mut elf = Elf::sound();
        for program in &mut elf.programs {
            program.2 = program.2 - BASE + RAMDISK_AT;
        }
        elf.programs[2].4 = 0x10_0000;
        elf.entry = elf.entry - BASE + RAMDISK_AT;
        let started = start(&elf).unwrap();
        check(&started);
        assert!(started.handover.page.as_u64() >= RAMDISK_AT + 0x10_0000);
    }

    #[test]
    fn a_dynamic_range_from_0_keeps_clear_of_the_handover_page_and_of_null() {
        let started = start(&configured(|c| {
            c.mappings.dynamic_range_start = Some(0);
            c.mappings.physical_memory = Some(Mapping::Dynamic);
        }))
        .unwrap();
        check(&started);
        assert_eq!(page(&started.pages, 0), None);
        assert_eq!(started.handover.page.as_u64(), RAMDISK_AT + 0x2000);
    }

    #[test]
    fn wishes_that_are_refused() {
        let refused = |change: fn(&mut BootloaderConfig)| start(&configured(change)).err().unwrap();
        let unsupported = |what| Error::Unsupported(what);
        assert_eq!(refused(|c| c.mappings.aslr = true), unsupported("random addresses (aslr)"));
        assert_eq!(
            refused(|c| c.mappings.kernel_base = Mapping::FixedAddress(0x1000)),
            unsupported("a base address without being position-independent")
        );
        assert_eq!(
            refused(|c| c.kernel_stack_size = 0),
            Error::BadConfig("the kernel stack has no size")
        );
        let taken = |what, address| Error::BadAddress {
            what,
            address,
            why: "the address is already in use",
        };
        assert_eq!(
            refused(|c| c.mappings.boot_info = Mapping::FixedAddress(BASE + 0x1000)),
            taken("the boot information", BASE + 0x1000)
        );
        assert!(matches!(
            refused(|c| c.mappings.page_table_recursive = Some(Mapping::FixedAddress(PAGE))),
            Error::BadAddress { what: "the recursive page table", .. }
        ));
        assert!(matches!(
            refused(|c| c.kernel_stack_size = 1 << 30),
            Error::NoMemory { what: "the kernel stack", .. }
        ));
        for huge in [1 << 46, u64::MAX] {
            let elf = configured(|c| c.kernel_stack_size = huge);
            assert!(start(&elf).is_err());
        }
    }

    #[test]
    fn too_little_memory_is_an_error_at_every_step() {
        let elf = configured(|c| c.mappings.physical_memory = Some(Mapping::Dynamic));
        let fixed = 0x10_0000 + 0x2000;
        let setup = |pages| Setup { bytes: fixed + pages * PAGE, ..SETUP };
        let results: Vec<_> = (0..80).map(|pages| start_with(&elf, setup(pages))).collect();
        let enough = results.iter().position(Result::is_ok).expect("80 pages are enough");
        let (poor, rich) = results.split_at(enough);
        assert!(poor.iter().all(|r| matches!(r, Err(Error::NoMemory { .. }))));
        rich.iter().for_each(|r| check(r.as_ref().unwrap()));
        assert!(enough > 30 && rich.len() > 1);
    }

    #[test]
    fn damaged_files_never_upset_the_loader() {
        for elf in [Elf::sound(), Elf::relocatable()] {
            let sound = elf.bytes();
            assert_eq!(elf.programs.iter().any(|p| p.0 == DYNAMIC), elf.kind == 3);
            let map =
                MemoryMap::new(&[E820Entry { start: 0x10_0000, len: 0x8_0000, kind: 1 }.into()]);
            let map = map.unwrap();
            let headers = 0..64 + 56 * elf.programs.len();
            let rest = sound.len() - 3 * 64 - 200..sound.len();
            for at in headers.chain(rest) {
                for value in [0, 1, 0x7f, 0x80, 0xff, sound[at] ^ 0x10] {
                    let mut file = sound.clone();
                    file[at] = value;
                    let machine = Machine {
                        kernel: &file,
                        kernel_at: PhysAddr::new(KERNEL_AT),
                        ramdisk: None,
                        rsdp: None,
                        framebuffer: None,
                        map: &map,
                        physical_bits: 36,
                        gib_pages: true,
                        five_level: false,
                    };
                    let frames = Frames::new(&map, PhysAddr::zero(), PhysAddr::new(1 << 32));
                    let mut memory = Recording::default();
                    if let Ok(handover) = load(&machine, &mut memory, frames) {
                        let pages = walk(&memory, handover.root, None);
                        assert!(pages.iter().all(|p| !(p.writable && p.executable)));
                        assert!(page(&pages, handover.entry.as_u64()).unwrap().executable);
                    }
                }
            }
        }
    }
}
