cat > /usr/local/bin/date-format << 'END'
#!/bin/bash
date -d "$1" "+$2"
END
chmod +x /usr/local/bin/date-format
