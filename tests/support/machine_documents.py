"""Configurations with most of what their formats can say, for tests of readers."""

from __future__ import annotations


def settings(hardware: str, *, beside: str = "", version: str = "1.19-linux", machine: str = "") -> str:
    return (
        f'<VirtualBox xmlns="http://www.virtualbox.org/" version="{version}">'
        f'<Machine uuid="{{11111111-2222-3333-4444-555555555555}}" name="m" OSType="Debian_64" {machine}>{beside}'
        f"<Hardware>{hardware}</Hardware></Machine></VirtualBox>"
    )


# Of a file that VirtualBox 7.2.22 wrote for a machine with two snapshots.
VBOX = settings(
    """
  <Memory RAMSize="4096"/>
  <Boot>
    <Order position="2" device="HardDisk"/><Order position="1" device="DVD"/><Order position="3" device="None"/>
  </Boot>
  <Display controller="VMSVGA" VRAMSize="64" monitorCount="2"/>
  <Firmware type="EFI64"/>
  <BIOS><IOAPIC enabled="true"/><SmbiosUuidLittleEndian enabled="true"/><AutoSerialNumGen enabled="true"/></BIOS>
  <TrustedPlatformModule type="v2_0" location=""/>
  <USB><Controllers><Controller name="xHCI" type="XHCI"/></Controllers></USB>
  <Network>
    <Adapter slot="0" enabled="true" MACAddress="080027AABBCC" type="82545EM">
      <DisabledModes><InternalNetwork name="intnet"/></DisabledModes><BridgedInterface name="eth0"/>
    </Adapter>
    <Adapter slot="1" enabled="true" MACAddress="080027B16433" cable="false" type="virtio">
      <InternalNetwork name="lan"/>
    </Adapter>
    <Adapter slot="2" enabled="true" MACAddress="080027AB8C27"><NATNetwork name="N1"/></Adapter>
    <Adapter slot="8" cable="false"><DisabledModes><NAT localhost-reachable="true"/></DisabledModes></Adapter>
  </Network>
  <UART>
    <Port slot="0" enabled="true" IOBase="0x3f8" IRQ="4" server="true" path="/tmp/pipe" hostMode="HostPipe"/>
    <Port slot="1" enabled="false" IOBase="0x2f8" IRQ="3" path="/tmp/out.txt" hostMode="RawFile"/>
  </UART>
  <AudioAdapter controller="HDA" useDefault="true" driver="ALSA" enabled="true"/>
  <StorageControllers>
    <StorageController name="SCSI" type="LsiLogic" PortCount="16" useHostIOCache="false" Bootable="true">
      <AttachedDevice type="HardDisk" hotpluggable="false" port="3" device="0">
        <Image uuid="{ac5f2bcb-748f-45d7-b342-7c57de700de0}"/>
      </AttachedDevice>
    </StorageController>
    <StorageController name="SATA" type="AHCI" PortCount="4" useHostIOCache="false" Bootable="true">
      <AttachedDevice nonrotational="true" discard="true" type="HardDisk" hotpluggable="false" port="0" device="0">
        <Image uuid="{317a6071-0b64-42bf-8eb8-1bc1fe24849a}"/>
      </AttachedDevice>
    </StorageController>
    <StorageController name="IDE" type="PIIX4" PortCount="2" useHostIOCache="true" Bootable="true">
      <AttachedDevice passthrough="false" type="DVD" hotpluggable="false" port="1" device="0">
        <Image uuid="{e683f024-7c82-4255-8a62-b9fd61672752}"/>
      </AttachedDevice>
      <AttachedDevice passthrough="false" type="DVD" hotpluggable="false" port="0" device="1"/>
    </StorageController>
  </StorageControllers>
  <RTC localOrUTC="UTC"/>
  <Chipset type="ICH9"/>
  <CPU count="4" hotplug="true">
    <CpuTree><Cpu id="0"/><Cpu id="1"/></CpuTree><PAE enabled="false"/><NestedHWVirt enabled="true"/>
  </CPU>""",
    machine='currentSnapshot="{5716c4c5-2e4a-4ff8-a4dc-1b36c1edae3b}" stateFile="Snapshots/s.sav"',
    beside="""<Description>a &lt;b&gt;
second</Description>
  <MediaRegistry>
    <HardDisks>
      <HardDisk uuid="{10eac034-7416-4d35-8dc3-e353bbfcc8c2}" location="a.vdi" format="VDI" type="Writethrough">
        <HardDisk uuid="{317a6071-0b64-42bf-8eb8-1bc1fe24849a}" location="Snapshots/{317a6071}.vdi" format="VDI"/>
      </HardDisk>
      <HardDisk uuid="{ac5f2bcb-748f-45d7-b342-7c57de700de0}" location="c.vhd" format="VHD" type="Normal"/>
    </HardDisks>
    <DVDImages><Image uuid="{e683f024-7c82-4255-8a62-b9fd61672752}" location="x.iso"/></DVDImages>
  </MediaRegistry>
  <ExtraData>
    <ExtraDataItem name="VBoxInternal/Devices/ahci/0/Config/Port0/SerialNumber" value="SER1"/>
    <ExtraDataItem name="VBoxInternal/Devices/efi/0/Config/DmiSystemSerial" value="string:VMware-42"/>
    <ExtraDataItem name="GUI/LastCloseAction" value="PowerOff"/>
  </ExtraData>
  <Snapshot uuid="{02fc7cfc-a215-4c83-9c06-1dca92e6b74a}" name="first snap" timeStamp="2026-11-29T23:54:18Z">
    <Hardware><Memory RAMSize="1"/></Hardware>
    <Snapshots><Snapshot uuid="{5716c4c5-2e4a-4ff8-a4dc-1b36c1edae3b}" name="second"><Hardware/></Snapshot></Snapshots>
  </Snapshot>""",
)

LIBVIRT = """<?xml version="1.0"?>
<!-- made by hand -->
<domain type='kvm'>
  <name>web</name>
  <uuid>421f245c-7fa8-60fa-8b8d-c3a4bd2b2f0d</uuid>
  <metadata>
    <libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0">
      <libosinfo:os id="http://microsoft.com/win/2k22"/>
    </libosinfo:libosinfo>
  </metadata>
  <memory unit='GiB'>2</memory>
  <currentMemory unit='GiB'>1</currentMemory>
  <vcpu current='2'>8</vcpu>
  <cputune><shares>512</shares></cputune>
  <os firmware='efi'>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <firmware>
      <feature enabled='yes' name='secure-boot'/>
      <feature enabled='yes' name='enrolled-keys'/>
    </firmware>
    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.ms.fd'>/var/lib/libvirt/qemu/nvram/web_VARS.fd</nvram>
    <smbios mode='sysinfo'/>
  </os>
  <sysinfo type='smbios'>
    <system><entry name='serial'>VMware-42 1f</entry><entry name='sku'>S</entry></system>
    <chassis><entry name='asset'>A1</entry></chassis>
  </sysinfo>
  <features><acpi/><apic/><smm state='on'/><hyperv><relaxed state='on'/></hyperv></features>
  <cpu mode='custom'><model>Skylake-Server</model><topology sockets='2' cores='2' threads='2'/></cpu>
  <clock offset='localtime'><timer name='hpet' present='no'/></clock>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none' discard='unmap'/>
      <source file='/images/web.qcow2'/><target dev='sda' bus='scsi'/>
      <boot order='2'/><serial>S1</serial>
      <address type='drive' controller='0' bus='0' target='3' unit='0'/>
    </disk>
    <disk type='block' device='disk'>
      <source dev='/dev/sdx'/><target dev='vda' bus='virtio'/><shareable/><transient/>
    </disk>
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw'/>
      <source protocol='rbd' name='pool/image'><host name='mon'/></source><target dev='hdc' bus='ide'/>
    </disk>
    <disk type='file' device='cdrom'><target dev='sdb' bus='sata' tray='open'/><readonly/></disk>
    <controller type='scsi' index='0' model='vmpvscsi'>
      <address type='pci' domain='0x0000' bus='0x03' slot='0x00' function='0x1'/>
    </controller>
    <controller type='usb' index='0' model='qemu-xhci'/>
    <interface type='bridge'>
      <mac address='52:54:00:AA:BB:CC'/><source bridge='br0'/><model type='vmxnet3'/><link state='down'/>
      <boot order='1'/>
    </interface>
    <interface type='network'><source network='lan'/><mtu size='9000'/></interface>
    <interface type='user'/>
    <interface type='direct'><source dev='eth0' mode='bridge'/></interface>
    <serial type='tcp'>
      <source mode='bind' host='127.0.0.1' service='4555'/><protocol type='telnet'/><target port='1'/>
    </serial>
    <hostdev mode='subsystem' type='pci'>
      <source><address domain='0x0' bus='0x1' slot='0' function='0'/></source>
    </hostdev>
    <video><model type='vmvga' vram='16384' heads='1'/></video>
    <sound model='ich6'/>
    <watchdog model='i6300esb'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
    <filesystem type='mount'><source dir='/'/><target dir='host'/></filesystem>
  </devices>
</domain>
"""

KUBEVIRT = """
apiVersion: kubevirt.io/v1
kind: VirtualMachine
metadata:
  name: web
  namespace: vms
  labels: {app: web}
  annotations: {description: "a\\nb", vm.kubevirt.io/os: win2k22}
spec:
  runStrategy: Always
  dataVolumeTemplates:
  - metadata: {name: web-data, annotations: {vmconv/file: data.qcow2, vmconv/format: qcow2}}
    spec: {source: {upload: {}}, storage: {resources: {requests: {storage: 10Gi}}}}
  template:
    spec:
      architecture: amd64
      nodeSelector: {zone: a}
      domain:
        chassis: {serial: C, asset: A}
        clock: {utc: {}, timer: {hpet: {present: false}}}
        cpu: {cores: 2, sockets: 4, model: host-model}
        memory: {guest: 2Gi}
        machine: {type: pc-q35-rhel9.2.0}
        features: {acpi: {}, smm: {enabled: true}, hyperv: {relaxed: {}}}
        firmware:
          bootloader: {efi: {persistent: true}}
          uuid: 421f245c-7fa8-60fa-8b8d-c3a4bd2b2f0d
          serial: VMware-42
        devices:
          tpm: {persistent: true}
          rng: {}
          sound: {name: s, model: ac97}
          watchdog: {name: w, i6300esb: {action: reset}}
          hostDevices: [{name: gpu, deviceName: nvidia.com/GP102}]
          disks:
          - {name: root, bootOrder: 1, disk: {bus: virtio}, serial: S1}
          - {name: claim, lun: {bus: scsi}, shareable: true}
          - {name: cd, cdrom: {bus: sata}}
          - {name: scratch, disk: {}}
          interfaces:
          - {name: default, masquerade: {}, model: e1000, macAddress: "52-54-00-AA-BB-CC"}
          - {name: lan, bridge: {}, bootOrder: 2, state: down}
      networks:
      - {name: default, pod: {}}
      - {name: lan, multus: {networkName: vms/lan}}
      volumes:
      - {name: root, dataVolume: {name: web-data}}
      - {name: claim, persistentVolumeClaim: {claimName: shared}}
      - {name: cd, containerDisk: {image: "registry/tools:1"}}
      - {name: scratch, emptyDisk: {capacity: 1500M}}
"""

PROXMOX = """\
#a note
agent: 1
balloon: 1024
bios: ovmf
boot: order=scsi0;net0
cicustom: user=local:snippets/u.yaml
cores: 2
cpu: host,flags=+aes
cpulimit: 2
efidisk0: local:100/vm-100-disk-0.raw,efitype=4m,pre-enrolled-keys=1,size=4M
hostpci0: 0000:01:00.0,pcie=1
hotplug: disk
ide2: local:iso/x.iso,media=cdrom,size=1M
localtime: 1
machine: pc-q35-8.1,viommu=intel
memory: 2048
meta: creation-qemu=8.1
name: web
net0: virtio=52:54:00:01:02:03,bridge=vmbr0,firewall=1,tag=5,link_down=1
numa: 1
onboot: 1
ostype: win11
protection: 1
rng0: source=/dev/urandom,max_bytes=1024
scsi0: local:100/vm-100-disk-1.raw,aio=native,cache=none,discard=on,iothread=1,serial=S,size=16M,ssd=1
scsihw: virtio-scsi-single
searchdomain: example.org
serial0: socket
shares: 500
smbios1: uuid=564d1234-0000-1111-2222-333344445555,serial=A,sku=B
sockets: 2
tags: a;b
tpmstate0: local:100/vm-100-disk-2.raw,size=4M,version=v2.0
usb0: host=1234:5678
vcpus: 3
vga: qxl2,memory=32
virtiofs0: dir
vmgenid: 11111111-2222-3333-4444-555555555555
watchdog: model=i6300esb,action=reset
"""

VMX = """\
.encoding = "UTF-8"
config.version = "8"
virtualHW.version = "19"
displayName = "web"
annotation = "a|0Ab"
guestOS = "windows9-64"
firmware = "efi"
uefi.secureBoot.enabled = "TRUE"
nvram = "web.nvram"
numvcpus = "4"
cpuid.coresPerSocket = "2"
vcpu.hotadd = "TRUE"
memsize = "2048"
mem.hotadd = "TRUE"
sched.mem.min = "100"
uuid.bios = "56 4d 12 34 00 00 11 11-22 22 33 33 44 44 55 55"
vc.uuid = "52 00 00 00 00 00 11 11-22 22 33 33 44 44 55 55"
vm.genid = "12"
vm.genidX = "34"
vtpm.present = "TRUE"
bios.bootOrder = "hdd,cdrom"
bios.bootDelay = "100"
rtc.diffFromUTC = "0"
svga.present = "TRUE"
svga.vramSize = "8388608"
usb.present = "TRUE"
ehci.present = "TRUE"
sound.present = "TRUE"
sound.virtualDev = "hdaudio"
pciBridge0.present = "TRUE"
scsi0.present = "TRUE"
scsi0.virtualDev = "pvscsi"
scsi0.sharedBus = "virtual"
scsi0.pciSlotNumber = "160"
scsi0:0.present = "TRUE"
scsi0:0.fileName = "web.vmdk"
scsi0:0.mode = "independent-persistent"
scsi0:0.ctkEnabled = "TRUE"
sched.scsi0:0.shares = "high"
sata0.present = "TRUE"
sata0:0.present = "TRUE"
sata0:0.deviceType = "cdrom-image"
sata0:0.fileName = "x.iso"
sata0:0.startConnected = "FALSE"
ethernet0.present = "TRUE"
ethernet0.virtualDev = "vmxnet3"
ethernet0.networkName = "LAN"
ethernet0.addressType = "static"
ethernet0.address = "00:50:56:01:02:03"
ethernet0.wakeOnPcktRcv = "FALSE"
ethernet0.uptCompatibility = "TRUE"
serial0.present = "TRUE"
serial0.fileType = "pipe"
serial0.fileName = "/tmp/pipe"
serial0.yieldOnMsrRead = "TRUE"
floppy0.present = "FALSE"
guestinfo.x = "y"
"""
