package ringfence

// slotCount is the number of hash slots of a Redis Cluster.
const slotCount = 16384

// slotTable is CRC-16/XMODEM, the polynomial 0x1021, as the Redis Cluster specification
// prescribes.
var slotTable = func() (t [256]uint16) {
	for i := range t {
		crc := uint16(i) << 8
		for range 8 {
			if crc&0x8000 != 0 {
				crc = crc<<1 ^ 0x1021
			} else {
				crc <<= 1
			}
		}
		t[i] = crc
	}
	return t
}()

// slotOf is the slot of a key whose part between the braces is tag.
func slotOf(tag []byte) int {
	crc := uint16(0)
	for _, b := range tag {
		crc = crc<<8 ^ slotTable[byte(crc>>8)^b]
	}
	return int(crc % slotCount)
}
